"""From a checkpoint's tensors to the list of tensors a GGUF file will hold: names, shapes, types, reasons.

Nothing of a checkpoint is dropped in silence: a tensor that no rule uses, one that is missing, and one whose
shape contradicts the config each end the conversion with the tensor's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from azquant.architectures.base import (
    Architecture,
    Constant,
    Keep,
    ModelConfig,
    ScaleRows,
    TensorRule,
    Transform,
    Transpose,
    show_shape,
)
from azquant.checkpoint import Checkpoint, LazyTensor
from azquant.conversion.lora import Adapter, MergedTensor
from azquant.conversion.metadata import size_label
from azquant.conversion.recipe import TARGETS, Choice, Model, Target, Weight, choose_types
from azquant.conversion.stack import StackedSource
from azquant.errors import ConversionError
from azquant.gguf import TensorSpec, keys
from azquant.types import GGMLType

__all__ = ["CONVERT_TYPES", "Plan", "PlannedTensor", "block_warnings", "make_plan"]

CONVERT_TYPES = tuple(TARGETS)
"""What :func:`azquant.convert` makes."""

Source = LazyTensor | MergedTensor | StackedSource

_FLOATS = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2")
_COMPARE_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor to be written."""

    rule: TensorRule
    source: Source | None
    """``None`` for a tensor computed from the config."""
    type: GGMLType
    reason: str
    """Why ``type`` is not the one asked for; empty when it is."""

    @property
    def spec(self) -> TensorSpec:
        """What the GGUF writer needs to know of it."""
        return TensorSpec(self.rule.name, self.rule.shape, self.type)


@dataclass(frozen=True)
class Plan:
    """All tensors in file order, and what is to be said about them."""

    tensors: tuple[PlannedTensor, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Weights in the file."""
        return sum(prod(item.rule.shape) for item in self.tensors)

    @property
    def size_label(self) -> str:
        """Weights as GGUF names say it: experts are counted once, and their number stands before."""
        once = sum(prod(item.rule.shape) // (len(item.rule.parts) or 1) for item in self.tensors)
        return size_label(once, max((len(item.rule.parts) for item in self.tensors), default=0))


def make_plan(
    architecture: Architecture[Any],
    config: ModelConfig,
    checkpoint: Checkpoint,
    target: Target,
    adapter: Adapter | None = None,
) -> Plan:
    """Match every rule of ``architecture`` with a tensor of ``checkpoint``; choose types as llama-quantize.

    With ``adapter``, the tensors that it changes are merged with it. Raises ConversionError for a tensor that
    is missing, left over, of the wrong shape or not of floats.
    """
    rules = architecture.rules(config)
    head = next(rule for rule in rules if rule.name == architecture.HEAD)
    embedding = next(rule for rule in rules if rule.name == architecture.EMBEDDING)
    merged: Mapping[str, Source] = checkpoint.tensors
    if adapter:
        merged = adapter.merge(
            checkpoint.tensors,
            head=head.source,
            embedding=embedding.source,
            transposed={rule.source for rule in rules if _turns(rule.transform)},
        )
    prefix, tensors = _without_prefix(architecture, checkpoint, merged)
    warnings = list(config.warnings)
    notes = list(config.notes)

    sources = dict(tensors)
    if config.tied and embedding.source not in sources and head.source in sources:
        sources[embedding.source] = sources.pop(head.source)  # one matrix, saved under its other name
    table = sources.get(embedding.source)
    if isinstance(table, MergedTensor) and head.source not in sources:
        sources[head.source] = table.base  # in PEFT, the tied head keeps the weights it had
        notes.append("the adapter changes the embedding, but not the head tied to it: both are stored")
    ends = table, sources.get(head.source)
    separate = _has_own_head(config, *ends, warnings, notes)
    if separate and architecture.head == "tied":
        raise ConversionError(
            f"{_files(checkpoint)}: {head.source} is not the embedding, but GGUF's {architecture.name} has "
            "no separate output head"
        )
    if not separate and architecture.head == "required" and embedding.source in sources:
        sources[head.source], separate = sources[embedding.source], True
        notes.append(f"the embedding is stored twice: llama.cpp's {architecture.name} needs output.weight")

    matched: list[tuple[TensorRule, Source | None]] = []
    used = {head.source, embedding.source}
    for rule in rules:
        if rule is head and not separate:
            continue
        source = None
        if isinstance(rule.transform, Constant):
            if not rule.transform.values:
                continue
        else:
            parts = rule.parts or (rule.source,)
            used.update(parts)
            for part in parts:
                if part not in sources:
                    shown = part if rule is head else prefix + part
                    raise ConversionError(f"tensor {shown} is missing from {_files(checkpoint)}")
                _check_source(rule, sources[part], architecture, checkpoint)
            source = sources[rule.source] if not rule.parts else _stacked(rule, sources, prefix)
        matched.append((rule, source))

    left = [name for name in tensors if name not in used and not architecture.is_harmless(name)]
    if left:
        names = ", ".join(tensors[name].name for name in left[:3])
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise ConversionError(
            f"{_files(checkpoint)}: {names}{more} would be dropped: "
            f"a {architecture.name} model with this config has no such tensor"
        )
    facts = {key: value.value for key, value in config.metadata().items()}
    model = Model.from_metadata({keys.ARCHITECTURE: architecture.name, **facts})
    choices = choose_types([Weight(rule.name, rule.shape, None) for rule, _ in matched], target, model)
    warnings += block_warnings({rule.name: choices[rule.name] for rule, _ in matched})
    planned = tuple(
        PlannedTensor(rule, source, choices[rule.name].type, choices[rule.name].reason)
        for rule, source in matched
    )
    return Plan(planned, tuple(warnings), tuple(notes))


def _stacked(rule: TensorRule, sources: Mapping[str, Source], prefix: str) -> StackedSource:
    parts = [sources[name] for name in rule.parts]
    return StackedSource(prefix + rule.source, [p for p in parts if not isinstance(p, StackedSource)])


def _turns(transform: Transform) -> bool:
    return isinstance(transform.inner if isinstance(transform, ScaleRows) else transform, Transpose)


def _without_prefix(
    architecture: Architecture[Any], checkpoint: Checkpoint, names: Mapping[str, Source]
) -> tuple[str, dict[str, Source]]:
    """The prefix this checkpoint uses, and its tensors by their names without it."""
    prefix = next((p for p in architecture.prefixes if any(name.startswith(p) for name in names)), "")
    tensors: dict[str, Source] = {}
    for name, tensor in names.items():
        short = name.removeprefix(prefix)
        if short in tensors:
            raise ConversionError(
                f"{_files(checkpoint)}: {short} and {prefix}{short} are the same tensor twice"
            )
        tensors[short] = tensor
    return prefix, tensors


def _has_own_head(
    config: ModelConfig,
    embedding: Source | None,
    head: Source | None,
    warnings: list[str],
    notes: list[str],
) -> bool:
    """Whether the file needs ``output.weight``; without it, a runtime uses the embedding as the head."""
    if head is None:
        # Absent though the config says it is separate: required, so that the plan names it as missing.
        return config.tied is False
    if embedding is None or not _equal(embedding, head):
        if config.tied and not isinstance(embedding, MergedTensor) and not isinstance(head, MergedTensor):
            warnings.append(
                f"config.json ties the head to the embedding, but {head.name} differs from it: "
                "both are kept, as transformers 5 reads it"
            )
        return True
    notes.append(f"{head.name} equals the embedding: stored once")
    return False


def _equal(a: Source, b: Source) -> bool:
    if a.shape != b.shape or len(a.shape) != 2:
        return False
    rows = max(1, _COMPARE_ELEMENTS // max(1, a.shape[1]))
    return all(map(np.array_equal, Keep().bands(a, rows), Keep().bands(b, rows)))


def _check_source(
    rule: TensorRule, source: Source, architecture: Architecture[Any], checkpoint: Checkpoint
) -> None:
    expected = rule.shape[1:] if rule.parts else rule.transform.source_shape(rule.shape)
    if tuple(source.shape) != expected:
        config: Mapping[str, Any] = checkpoint.config or {}
        sizes = ", ".join(f"{key}={config[key]}" for key in architecture.hf_sizes if key in config)
        who = f"config.json ({sizes}) asks" if sizes else "the sizes of the other tensors ask"
        raise ConversionError(
            f"tensor {source.name} of {source.file} has shape {show_shape(source.shape)}, "
            f"but {who} for {show_shape(expected)}"
        )
    if source.dtype not in _FLOATS:
        raise ConversionError(
            f"tensor {source.name} of {source.file} holds {source.dtype}, not floating-point weights"
        )


def block_warnings(choices: Mapping[str, Choice]) -> list[str]:
    """What is to be said of tensors that no block fits: one warning per reason, not per tensor."""
    odd: dict[tuple[str, str], list[str]] = {}
    for name, choice in choices.items():
        if choice.fallback:
            odd.setdefault((choice.reason, choice.type.name), []).append(name)
    return [
        f"{reason}: {len(names)} tensor{'s' if len(names) > 1 else ''} written as {type_} ({names[0]}"
        f"{', ...' if len(names) > 1 else ''})"
        for (reason, type_), names in odd.items()
    ]


def _files(checkpoint: Checkpoint) -> str:
    """The checkpoint's files, for messages."""
    names = [path.name for path in checkpoint.files]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} ... {names[-1]} ({len(names)} files)"
