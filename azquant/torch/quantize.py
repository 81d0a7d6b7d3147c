"""quantize_: a model's linear and embedding layers replaced in place, and a report of what that cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import nn

from azquant.architectures import Architecture
from azquant.conversion.recipe import Choice, Model, Target, Weight, choose_types, get_target
from azquant.errors import ArgumentError, ConversionError, ModelError
from azquant.gguf import keys
from azquant.tensor import QTensor
from azquant.torch.bindings import bindings, model_config
from azquant.torch.embedding import QuantEmbedding
from azquant.torch.linear import QuantLinear, dense_weight, is_conv1d, quantized_weight
from azquant.torch.packed import PackedModule
from azquant.types import GGMLType, get_type

__all__ = ["LayerRow", "QuantizeReport", "quantize_", "replace_modules"]

Filter = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class LayerRow:
    """One linear or embedding layer of the model."""

    name: str
    """Its name in the model: ``"transformer.h.0.attn.c_attn"``."""
    kind: str
    """Its class: ``"Linear"``, ``"Conv1D"``, ``"Embedding"``, or one derived from them."""
    shape: tuple[int, int]
    """(out, in), or (rows, columns) of an embedding."""
    type: str
    """The ggml type; empty where the layer was kept."""
    before: int
    """Bytes of the weight before; 0 where it was another layer's."""
    after: int
    """Bytes of the weight now; 0 where it is another layer's."""
    error: float
    """Relative L2 error of the weight, ‖W - W'‖ / ‖W‖; 0 where it was kept."""
    reason: str
    """Why the layer was kept, or has another type than was asked for; else empty."""


@dataclass(frozen=True)
class QuantizeReport:
    """What :func:`quantize_` replaced, saved and lost."""

    rows: tuple[LayerRow, ...]
    """Every linear and embedding layer, in the model's order."""

    @property
    def replaced(self) -> tuple[LayerRow, ...]:
        """The layers that are quantized now."""
        return tuple(row for row in self.rows if row.type)

    @property
    def kept(self) -> tuple[LayerRow, ...]:
        """The layers that were left as they were, each with its reason."""
        return tuple(row for row in self.rows if not row.type)

    @property
    def before(self) -> int:
        """Bytes of the replaced layers' weights before."""
        return sum(row.before for row in self.replaced)

    @property
    def after(self) -> int:
        """Bytes of the replaced layers' weights now."""
        return sum(row.after for row in self.replaced)

    def __str__(self) -> str:
        lines = [
            f"{len(self.replaced)} of {len(self.rows)} layers quantized: "
            f"{self.before:,} -> {self.after:,} bytes"
            + (f" ({self.after / self.before:.3f}x)" if self.before else "")
        ]
        width = max((len(row.name) for row in self.rows), default=0)
        for row in self.rows:
            shape = "x".join(map(str, row.shape))
            what = f"{row.type:8} {row.after:>12,} bytes  error {row.error:.4f}" if row.type else "kept"
            lines.append(
                f"  {row.name:{width}}  {shape:>14}  {what}" + (f"  ({row.reason})" if row.reason else "")
            )
        return "\n".join(lines)


def quantize_(
    model: nn.Module,
    type: str | GGMLType = "q4_0",
    filter: Filter | None = None,
    skip: Iterable[str] = (),
    *,
    head: str | GGMLType | None = None,
    compute: str = "auto",
) -> QuantizeReport:
    """Replaces a model's layers by quantized ones, in place: Linear, Embedding and GPT-2's Conv1D.

    ``type`` is one of azquant.convert's (q4_0, q4_k_m, q8_0, ...), and a transformers model's layers get the
    types that :func:`azquant.convert` gives them: the output head, and an embedding tied to it, more bits
    (``head`` says otherwise), positions none. Rows that no block fits stay dense. Tied layers stay tied.

    ``filter(module, name)`` decides instead which layers are taken; ``skip`` names layers to leave alone, by
    name or pattern (``"*.lm_head"``). ``compute`` is handed to every QuantLinear.

    Nothing is changed unless everything can be. Raises NonFiniteError naming the tensor, ArgumentError (no
    CPU tensors; the model itself is one layer; a pattern that fits nothing), UnsupportedTypeError.
    """
    target = get_target(type)
    head_type = None if head is None else get_type(head)
    if _kind(model):
        raise ArgumentError(
            f"the model is itself one layer ({_kind(model)}), which cannot be replaced in place: "
            "use QuantLinear.from_linear or QuantEmbedding.from_embedding"
        )
    layers = {name: module for name, module in model.named_modules(remove_duplicate=False) if _kind(module)}
    reasons = _reasons_to_keep(model, layers, filter, tuple(skip))
    made: dict[str, PackedModule] = {}
    rows: dict[str, LayerRow] = {}
    for names, choice in _choices(model, layers, _groups(model, layers), target, head_type):
        _replace_group(names, layers, reasons, choice, compute, made, rows)
    replace_modules(model, made)
    return QuantizeReport(tuple(rows[name] for name in layers))


def replace_modules(model: nn.Module, modules: dict[str, PackedModule]) -> None:
    """Puts each module at its name."""
    for name, module in modules.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module)


# ---- choosing ----------------------------------------------------------------------------------------


def _kind(module: nn.Module) -> str:
    """The class of a linear or embedding layer, "" for other modules."""
    known = isinstance(module, (nn.Linear, nn.Embedding)) or is_conv1d(module)
    return module.__class__.__name__ if known and not isinstance(module, PackedModule) else ""


def _ask(model: nn.Module, method: str) -> nn.Module | None:
    """What a transformers model says, or None for other models."""
    found = getattr(model, method, None)
    try:
        answer = found() if callable(found) else None
    except (AttributeError, NotImplementedError):  # a base class without an answer
        return None
    return answer if isinstance(answer, nn.Module) else None


def _reasons_to_keep(
    model: nn.Module, layers: dict[str, nn.Module], filter: Filter | None, skip: tuple[str, ...]
) -> dict[str, str]:
    """Why each layer is not to be quantized; none for those that are."""
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ArgumentError(f"skip: {pattern!r} fits no linear or embedding layer of the model")
    tokens = _ask(model, "get_input_embeddings")
    reasons = {}
    for name, module in layers.items():
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        if any(fnmatchcase(name, pattern) for pattern in skip):
            reasons[name] = "skip"
        elif filter is not None:
            if not filter(module, name):
                reasons[name] = "filter"
        elif module.__class__ not in (nn.Linear, nn.Embedding) and not is_conv1d(module):
            reasons[name] = (
                f"{_kind(module)} may compute otherwise than its base class; filter can say it does not"
            )
        elif isinstance(module, nn.Embedding) and tokens is not None and module is not tokens:
            reasons[name] = "positions and types stay dense"
        if name not in reasons and isinstance(module, nn.Embedding) and module.max_norm is not None:
            reasons[name] = "max_norm rewrites rows"
        if name not in reasons and not weight.is_floating_point():
            reasons[name] = f"holds {weight.dtype}"
    return reasons


def _groups(model: nn.Module, layers: dict[str, nn.Module]) -> list[tuple[list[str], bool]]:
    """The names that share a weight, and whether one of them is the output head."""
    head, tokens = _ask(model, "get_output_embeddings"), _ask(model, "get_input_embeddings")
    groups: dict[int, list[str]] = {}
    for name, module in layers.items():
        groups.setdefault(id(module.weight), []).append(name)
    if head is not None and tokens is not None and _same_values(head, tokens):
        # Two copies of one matrix, as a file may hold them: stored once, as convert does.
        groups.setdefault(id(tokens.weight), []).extend(groups.pop(id(head.weight), []))
    found = []
    for names in groups.values():
        embeds = {isinstance(layers[name], nn.Embedding) for name in names}
        is_head = any(layers[name] is head for name in names) or len(embeds) == 2
        found.append((names, is_head))
    return found


def _same_values(head: nn.Module, tokens: nn.Module) -> bool:
    a, b = getattr(head, "weight", None), getattr(tokens, "weight", None)
    if not (_kind(head) and _kind(tokens) and isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return False
    return a is not b and a.shape == b.shape and a.device.type == b.device.type == "cpu" and torch.equal(a, b)


def _choices(
    model: nn.Module,
    layers: dict[str, nn.Module],
    groups: list[tuple[list[str], bool]],
    target: Target,
    head: GGMLType | None,
) -> list[tuple[list[str], Choice]]:
    """The type of each group: by llama-quantize's rules for the GGUF tensor that it will be."""
    known: dict[str, Choice] = {}
    try:
        _, architecture, config = model_config(model)
        bound = bindings(model, architecture, config)
        heads = [names for names, is_head in groups if is_head]
        tied = {name for names in heads if len(names) > 1 for name in names}
        weights = [
            Weight(b.rule.name, b.rule.shape, None)
            for b in bound.values()
            if b.rule.name != Architecture.HEAD or b.owner not in tied
        ]
        facts = {key: value.value for key, value in config.metadata().items()}
        facts_of = Model.from_metadata({keys.ARCHITECTURE: architecture.name, **facts})
        chosen = choose_types(weights, target, facts_of)
        known = {
            b.owner: chosen[key] for key, b in bound.items() if b.attribute == "weight" and key in chosen
        }
    except (ArgumentError, ConversionError, ModelError):
        pass  # no transformers model, or one that has no GGUF form: every layer by itself
    found = []
    for names, is_head in groups:
        choice = next((known[name] for name in names if name in known), None)
        if is_head and head is not None:
            choice = Choice(head, "the output head, as asked")
        if choice is None:
            name = Architecture.HEAD if is_head else "blk.0.ffn_up.weight"
            weight = Weight(name, _shape(layers[names[0]]), None)
            choice = choose_types([weight], target, Model("", 1))[name]
        found.append((names, choice))
    return found


# ---- replacing ---------------------------------------------------------------------------------------


def _replace_group(
    names: list[str],
    layers: dict[str, nn.Module],
    reasons: dict[str, str],
    choice: Choice,
    compute: str,
    made: dict[str, PackedModule],
    rows: dict[str, LayerRow],
) -> None:
    """The layers that share one weight: all of them, or none."""
    first = layers[names[0]]
    reason = next((reasons[n] for n in names if n in reasons), "")
    shape = _shape(first)
    chosen = choice.type
    if not reason and shape[1] % chosen.block_size:
        reason = f"rows of {shape[1]} are no whole number of {chosen.name} blocks ({chosen.block_size})"
    if not reason and not chosen.is_quantized and choice.reason:
        reason = choice.reason
    if reason:
        for i, name in enumerate(names):
            why = (
                reason
                if len(names) == 1 or name in reasons
                else f"shares its weight with {names[0]}: {reason}"
            )
            nbytes = 0 if i else _nbytes(layers[name])
            rows[name] = LayerRow(name, _kind(layers[name]), shape, "", nbytes, nbytes, 0.0, why)
        return
    q = quantized_weight(first, chosen, names[0])
    error = _error(first, q)
    new_of: dict[int, PackedModule] = {}
    for name in names:
        old = layers[name]
        if id(old) not in new_of:
            new = _quantized(old, q, compute)
            if new_of:
                new.tie(next(iter(new_of.values())))
            new_of[id(old)] = new
        made[name] = new_of[id(old)]
        before, after = (0, 0) if rows.keys() & names else (_nbytes(old), made[name].packed.nbytes)
        rows[name] = LayerRow(name, _kind(old), shape, chosen.name, before, after, error, choice.reason)


def _quantized(old: nn.Module, q: QTensor, compute: str) -> PackedModule:
    new: PackedModule
    if compute == "int8" and not q.matrix.can_int8:
        compute = "auto"  # a head in q6_k, say
    if isinstance(old, nn.Embedding):
        new = QuantEmbedding.from_qtensor(q, padding_idx=old.padding_idx, dtype=old.weight.dtype)
    else:
        bias = old.bias
        new = QuantLinear.from_qtensor(q, bias if isinstance(bias, torch.Tensor) else None, compute=compute)
    return new.train(old.training)


def _shape(module: nn.Module) -> tuple[int, int]:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    return (columns, rows) if is_conv1d(module) else (rows, columns)


def _nbytes(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.nbytes


def _error(module: nn.Module, q: QTensor) -> float:
    """Relative L2 distance of the quantized weight from the original."""
    dense = dense_weight(module).numpy()
    norm = float(np.linalg.norm(dense))
    return float(np.linalg.norm(dense - q.dequantize())) / norm if norm else 0.0
