"""transformers models, and LoRA adapters trained on them, as GGUF files.

The plan is the converter's: a model that :func:`azquant.torch.quantize_` changed is written as
:func:`azquant.convert` would have written its checkpoint, byte for byte. Quantized layers give their bytes,
dense ones are encoded in the type that the plan says.

Source of the adapter's format: llama.cpp's reader of LoRA adapters (src/llama-adapter.cpp).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from azquant._hashing import file_hashes
from azquant.architectures import Architecture
from azquant.architectures.base import ScaleRows, Transpose
from azquant.checkpoint import Checkpoint, LazyTensor, open_checkpoint
from azquant.checkpoint.source import FileSource
from azquant.conversion.metadata import general_metadata, source_metadata
from azquant.conversion.plan import Plan, PlannedTensor, make_plan
from azquant.conversion.recipe import TARGETS, Target, get_target
from azquant.conversion.tokenizer import tokenizer_metadata
from azquant.conversion.write import encoded_bands
from azquant.errors import ArgumentError, ConversionError, ShapeError
from azquant.gguf import MetadataValue, TensorSpec, check_output, keys, open_gguf, write_gguf
from azquant.torch.bindings import bindings, model_config, row_order
from azquant.torch.embedding import QuantEmbedding
from azquant.torch.packed import PackedModule
from azquant.types import TYPES, GGMLType

__all__ = ["save_gguf", "save_lora_gguf"]

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_HERE = Path("the model in memory")


class _Memory:
    """Stands for the file where messages and checkpoints want one."""

    path = _HERE

    def close(self) -> None: ...


@dataclass(frozen=True)
class _ModuleTensor:
    """A weight or bias of the model as the planner takes a checkpoint's tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    module: nn.Module
    attribute: str
    transposed: bool = False
    file: Path = _HERE

    @property
    def packed(self) -> PackedModule | None:
        """The module, if this is its quantized weight."""
        return self.module if isinstance(self.module, PackedModule) and self.attribute == "weight" else None

    def read_f32(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows ``[start:stop]``."""
        if self.packed is not None:
            values = self.packed.dequantize()
            values = values.T if self.transposed else values
        else:
            values = getattr(self.module, self.attribute).detach()
        rows: NDArray[np.float32] = values[start:stop].to(torch.float32).contiguous().numpy()
        return rows


def save_gguf(
    module: nn.Module,
    path: str | PathLike[str],
    *,
    folder: str | PathLike[str] | None = None,
    like: str | PathLike[str] | None = None,
    type: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a transformers model (GPT-2, Llama and their like) as a GGUF file.

    Quantized layers are written as they are. A dense matrix keeps its dtype; where its rows are no whole
    number of blocks in a quantized model it becomes f16, as in :func:`azquant.convert`. The metadata come
    from

    - ``folder``, the checkpoint folder that the model was loaded from: name, tokenizer and hashes, so that
      the file equals what ``convert`` makes of the folder;
    - ``like``, a GGUF file such as the one that ``load_gguf`` read: all of its keys, and the tensors' order;
    - or the model's config alone: such a file has no tokenizer.

    ``type`` is the target that the model was quantized to, as ``general.file_type`` records it; without it,
    the one that comes nearest to the layers' types.

    ``path`` appears whole or not at all. Raises ArgumentError, ConversionError, TokenizerError,
    NonFiniteError, OutputError and, for ``folder`` and ``like``, what opening them raises.
    """
    if folder is not None and like is not None:
        raise ArgumentError("folder and like both say where the metadata come from: give one")
    check_output(path, overwrite=overwrite)
    values, architecture, config = model_config(module)
    tensors = _tensors(module, architecture, config)
    source = Checkpoint(
        _HERE, "safetensors", cast(Mapping[str, LazyTensor], tensors), values, (cast(FileSource, _Memory()),)
    )
    main = _main_type(tensors)
    targets = [t for t in TARGETS.values() if t.type is main] if type is None else [get_target(type)]
    target, plan = _plan(architecture, config, source, targets or [TARGETS["f32"]])
    names = [item.rule.name for item in plan.tensors]
    files: tuple[Path, ...] = ()
    alignment = 32
    if like is not None:
        with open_gguf(like) as file:
            metadata: dict[str, MetadataValue] = file.copy_metadata()
            alignment, files = file.alignment, file.paths
            if set(file.tensors) == set(names):
                names = list(file.tensors)
        old = metadata.get(keys.FILE_TYPE)
        if old is not None and (type is not None or old.value not in _file_types(target)):
            metadata[keys.FILE_TYPE] = keys.u32(target.file_type)
    elif folder is not None:
        metadata, files = _folder_metadata(Path(folder), architecture, config, target, plan)
    else:
        before, after = general_metadata(
            Path(path).with_suffix(""), values, architecture.name, target, plan.size_label, "transformers"
        )
        metadata = {**before, **config.metadata(), **after}
    items = {item.rule.name: item for item in plan.tensors}
    write_gguf(
        path,
        metadata,
        [items[name].spec for name in names],
        lambda spec: _encoded(items[spec.name]),
        alignment=alignment,
        overwrite=overwrite,
        sources=files,
    )


def _tensors(module: nn.Module, architecture: Architecture[Any], config: Any) -> dict[str, _ModuleTensor]:
    """What the model holds, by its checkpoint's names; a tied head only where the config unties it."""
    bound = bindings(module, architecture, config)
    transposed = {b.owner for b in bound.values() if isinstance(_inner(b.rule.transform), Transpose)}
    found: dict[str, _ModuleTensor] = {}
    seen: set[int] = set()
    for name, owner in module.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        for key, parameter in owner.named_parameters(recurse=False):
            if parameter.device.type != "cpu":
                raise ArgumentError(f"{prefix}{key} is on {parameter.device}: the model must be on the CPU")
            if id(parameter) in seen and config.tied is not False:
                continue
            seen.add(id(parameter))
            dtype = _DTYPES.get(parameter.dtype, str(parameter.dtype))
            found[prefix + key] = _ModuleTensor(
                prefix + key, tuple(parameter.shape), dtype, parameter.nbytes, owner, key
            )
        if isinstance(owner, PackedModule) and (owner.tied_to is None or config.tied is False):
            shape = owner._shape[::-1] if name in transposed else owner._shape
            found[prefix + "weight"] = _ModuleTensor(
                prefix + "weight", shape, "F32", owner.packed.nbytes, owner, "weight", name in transposed
            )
    return found


def _inner(transform: Any) -> Any:
    return transform.inner if isinstance(transform, ScaleRows) else transform


def _main_type(tensors: Mapping[str, _ModuleTensor]) -> GGMLType:
    """The type that most weights have, not counting embedding and head unless there are no others."""
    inside: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    dense: Counter[str] = Counter()
    for tensor in tensors.values():
        size = int(np.prod(tensor.shape))
        if tensor.packed is None:
            dense[tensor.dtype.lower()] += size
        elif isinstance(tensor.module, QuantEmbedding) or tensor.name.startswith("lm_head"):
            ends[tensor.packed.quant_type] += size
        else:
            inside[tensor.packed.quant_type] += size
    ((name, _),) = (inside or ends or dense).most_common(1)
    return TYPES.get(name, TYPES["f32"])


def _file_types(target: Target) -> set[int]:
    """The file types whose tensors are mostly of the target's type."""
    return {other.file_type for other in TARGETS.values() if other.type is target.type}


def _plan(
    architecture: Architecture[Any], config: Any, source: Checkpoint, targets: list[Target]
) -> tuple[Target, Plan]:
    """The plan with the types that the model holds, and the target that it comes nearest to."""
    found = []
    for target in targets:
        wanted = make_plan(architecture, config, source, target)
        held = _as_held(wanted)
        same = sum(a.type is b.type for a, b in zip(wanted.tensors, held.tensors, strict=True))
        found.append((same, target, held))
    _, target, plan = max(found, key=lambda row: row[0])
    return target, plan


def _as_held(plan: Plan) -> Plan:
    """The plan with the types that the model's matrices have."""
    items = []
    for item in plan.tensors:
        source = item.source
        if isinstance(source, _ModuleTensor) and source.packed is not None:
            row_order(item.rule)  # refuses rules that change values
            item = replace(item, type=TYPES[source.packed.quant_type], reason="")
        elif isinstance(source, _ModuleTensor) and item.type.is_quantized:
            item = replace(
                item, type=TYPES.get(source.dtype.lower(), TYPES["f32"]), reason="dense in the model"
            )
        items.append(item)
    return replace(plan, tensors=tuple(items))


def _encoded(item: PlannedTensor) -> Iterator[NDArray[np.uint8]]:
    source = item.source
    if not isinstance(source, _ModuleTensor) or source.packed is None:
        yield from encoded_bands(item)
        return
    rows = source.packed.weight.numpy()
    order = row_order(item.rule)
    yield rows if order is None else rows[order]


def _folder_metadata(
    folder: Path, architecture: Architecture[Any], config: Any, target: Target, plan: Plan
) -> tuple[dict[str, MetadataValue], tuple[Path, ...]]:
    with open_checkpoint(folder) as checkpoint:
        if checkpoint.config is None:
            raise ConversionError(
                f"{folder}: there is no config.json; give the folder that save_pretrained wrote"
            )
        where = folder if folder.is_dir() else folder.parent
        before, after = general_metadata(
            where, checkpoint.config, architecture.name, target, plan.size_label, checkpoint.format
        )
        tokenizer = tokenizer_metadata(where, config.vocab_size, checkpoint.config)
        hashes = source_metadata(checkpoint.files, file_hashes(checkpoint.files))
        return {**before, **config.metadata(), **after, **hashes, **tokenizer}, tuple(checkpoint.files)


# ---- adapters ----------------------------------------------------------------------------------------


def save_lora_gguf(
    module: nn.Module,
    path: str | PathLike[str],
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    alpha: float,
    *,
    name: str = "",
    overwrite: bool = False,
) -> None:
    """Writes LoRA factors as a GGUF adapter, which llama.cpp applies to a GGUF file of the same model.

    ``factors``: for each linear layer's name in ``module`` the pair A (r, in) and B (out, r); the layer
    computes W x + alpha / r · B A x. Written in float32.

    Raises ArgumentError for a layer that is none of the model's linear layers, ShapeError, ConversionError,
    OutputError.
    """
    _, architecture, config = model_config(module)
    by_owner = {
        b.owner: b
        for b in bindings(module, architecture, config).values()
        if b.attribute == "weight"
        and len(b.rule.shape) == 2
        and not isinstance(b.module, (nn.Embedding, QuantEmbedding))
    }
    arrays: dict[str, NDArray[np.float32]] = {}
    for owner, (a, b) in factors.items():
        if owner not in by_owner:
            raise ArgumentError(
                f"{owner} is no linear layer of the model; known are {', '.join(by_owner)[:300]}"
            )
        rule = by_owner[owner].rule
        out, inner = rule.shape
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != inner or b.shape[0] != out or a.shape[0] != b.shape[1]:
            raise ShapeError(
                f"{owner}: A {tuple(a.shape)} and B {tuple(b.shape)} are not (r, {inner}) and ({out}, r)"
            )
        down, up = (t.detach().to(torch.float32).contiguous().numpy() for t in (a, b))
        order = row_order(rule)
        arrays[f"{rule.name}.lora_a"] = down
        arrays[f"{rule.name}.lora_b"] = up if order is None else np.ascontiguousarray(up[order])
    metadata = {
        keys.ARCHITECTURE: keys.string(architecture.name),
        keys.TYPE: keys.string("adapter"),
        keys.NAME: keys.string(name or Path(path).stem),
        "adapter.type": keys.string("lora"),
        "adapter.lora.alpha": keys.f32(alpha),
    }
    specs = [TensorSpec(key, array.shape, TYPES["f32"]) for key, array in arrays.items()]
    write_gguf(path, metadata, specs, lambda spec: [arrays[spec.name]], overwrite=overwrite)
