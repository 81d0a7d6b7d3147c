"""Checkpoints of models that people wrote themselves: no config.json, but names that tell the layout.

Two layouts are known (:mod:`azquant.architectures.nanogpt`). All sizes are read off the tensors; what tensors
cannot tell is read from nanoGPT's ``model_args``, or given by the caller:

=================  ==========================================================================
activation         of the feed-forward; the layouts' own: ``gelu`` (exact)
attention_scale    scores divided by sqrt(head size) (``head``) or sqrt(n_embd) (``embedding``)
heads              where neither ``model_args`` nor one module a head tells
=================  ==========================================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from azquant.architectures.base import Architecture, show_shape
from azquant.architectures.fields import MAX_BLOCKS, Fields
from azquant.architectures.gpt2 import GPT2Config
from azquant.architectures.nanogpt import COURSE, NANOGPT, Layout, layout_architecture
from azquant.checkpoint import Checkpoint, LazyTensor, StackedTensor
from azquant.errors import ArgumentError, ConversionError

__all__ = ["ACTIVATIONS", "ATTENTION_SCALES", "FromScratch", "ScratchOptions", "recognize"]

ACTIVATIONS = {"gelu": "gelu_erf", "gelu_tanh": "gelu_tanh", "relu": "relu"}
"""What ``activation`` may be, and the op that computes it."""
ATTENTION_SCALES = ("head", "embedding")

# Put before every name by torch.compile and by the data-parallel wrappers, in any order.
_WRAPPERS = ("_orig_mod.", "module.")
_LAYER_NORM_EPS = 1e-5  # torch's default, which neither layout changes


@dataclass(frozen=True)
class ScratchOptions:
    """What a checkpoint without a config does not say; ``None`` for what was not given."""

    activation: str | None = None
    attention_scale: str | None = None
    heads: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("activation", tuple(ACTIVATIONS)), ("attention_scale", ATTENTION_SCALES)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ArgumentError(f"{name}={value!r}: must be one of {', '.join(known)}")
        if self.heads is not None and (isinstance(self.heads, bool) or self.heads < 1):
            raise ArgumentError(f"heads={self.heads!r}: must be a whole number from 1")

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the options that were given."""
        return tuple(
            name for name in ("activation", "attention_scale", "heads") if getattr(self, name) is not None
        )


@dataclass(frozen=True)
class FromScratch:
    """A recognized checkpoint, ready for the plan."""

    architecture: Architecture[GPT2Config]
    config: GPT2Config
    checkpoint: Checkpoint
    """The same tensors without wrappers' prefixes, heads fused, the head's bias taken out."""
    layout: str
    notes: tuple[str, ...]


def recognize(checkpoint: Checkpoint, options: ScratchOptions) -> FromScratch:
    """Read layout and sizes off the tensors of ``checkpoint``.

    Raises ConversionError for a layout that is not known, sizes that contradict each other, or a number of
    heads that nothing tells.
    """
    tensors = _without_wrappers(checkpoint)
    layout = next((known for known in (NANOGPT, COURSE) if f"{known.embedding}.weight" in tensors), None)
    if layout is None:
        raise ConversionError(
            f"{checkpoint.path}: there is no config.json beside the weights, and the tensors' names "
            f"({', '.join(list(tensors)[:3])}, ...) are not those of nanoGPT (transformer.wte, ...) or a "
            "from-scratch GPT (token_embedding_table, ...). Convert the folder that save_pretrained wrote"
        )
    arguments = _model_args(checkpoint)
    notes: list[str] = []
    if layout is COURSE:
        counted: int | None = _fuse_heads(tensors, notes)
    else:
        _refuse_conv1d(tensors, checkpoint)
        counted = arguments.integer("n_head") if arguments.has("n_head") else None
    heads = _settle_heads(counted, options, checkpoint)
    bias = _take_output_bias(tensors, layout, notes)
    config = _config(tensors, layout, heads, bias, options)
    _check_against(arguments, config)
    _check_biases(tensors, layout)
    if options.activation is None:
        notes.append(f"activation: {layout.name}'s exact GELU is assumed; give activation= if it was another")
    if options.attention_scale is None and layout is COURSE:
        notes.append(
            "attention scale: 1/sqrt(head size) is assumed; attention_scale='embedding' means 1/sqrt(n_embd)"
        )
    architecture = layout_architecture(layout, frozenset(tensors))
    return FromScratch(architecture, config, checkpoint.with_tensors(tensors), layout.name, tuple(notes))


def _without_wrappers(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        short = name
        while short.startswith(_WRAPPERS):
            short = short.partition(".")[2]
        if short in tensors:
            raise ConversionError(
                f"{checkpoint.path}: {tensors[short].name} and {name} are the same tensor twice"
            )
        tensors[short] = tensor
    return tensors


def _model_args(checkpoint: Checkpoint) -> Fields:
    """nanoGPT's ``model_args``; empty where there are none."""
    found = checkpoint.extra.get("model_args") if checkpoint.format == "torch" else None
    return Fields(
        found if isinstance(found, Mapping) else {}, f"{checkpoint.path}: model_args", ConversionError
    )


def _refuse_conv1d(tensors: Mapping[str, LazyTensor], checkpoint: Checkpoint) -> None:
    """transformers' GPT-2 has the same names, but its matrices are transposed."""
    fused = tensors.get("transformer.h.0.attn.c_attn.weight")
    if fused is not None and len(fused.shape) == 2 and fused.shape[1] == 3 * fused.shape[0]:
        raise ConversionError(
            f"{checkpoint.path}: there is no config.json beside these weights, which are those of "
            "transformers' GPT-2; convert the folder that save_pretrained wrote"
        )


def _block_numbers(tensors: Mapping[str, LazyTensor], layout: Layout) -> int:
    pattern = re.compile(re.escape(layout.block) + r"\.(\d{1,6})\.")
    numbers = {int(match[1]) for name in tensors if (match := pattern.match(name))}
    count = max(numbers, default=-1) + 1
    if not 1 <= count <= MAX_BLOCKS:
        raise ConversionError(f"{layout.block}.N: {count} blocks, outside 1 to {MAX_BLOCKS}")
    return count


def _fuse_heads(tensors: dict[str, LazyTensor], notes: list[str]) -> int:
    """Stack each block's heads, all queries first, then keys, then values; returns how many there are."""
    pattern = re.compile(r"blocks\.(\d{1,6})\.sa\.heads\.(\d{1,6})\.(query|key|value)\.(weight|bias)")
    found: dict[int, dict[tuple[str, str, int], str]] = {}
    for name in tensors:
        if match := pattern.fullmatch(name):
            found.setdefault(int(match[1]), {})[match[4], match[3], int(match[2])] = name
    if not found:
        raise ConversionError(
            "blocks.0.sa.heads.0.query.weight is missing: these blocks have no attention heads"
        )
    heads = 1 + max(head for names in found.values() for _, _, head in names)
    for block, names in found.items():
        for kind in ("weight", "bias"):
            if kind == "bias" and not any(key[0] == "bias" for key in names):
                continue
            order = [(kind, part, head) for part in ("query", "key", "value") for head in range(heads)]
            absent = next((key for key in order if key not in names), None)
            if absent is not None:
                raise ConversionError(
                    f"blocks.{block}.sa.heads.{absent[2]}.{absent[1]}.{kind} is missing, though other heads "
                    f"have theirs ({heads} heads are counted)"
                )
            parts = [tensors.pop(names[key]) for key in order]
            odd = next((p for p in parts if p.shape != parts[0].shape or p.dtype != parts[0].dtype), None)
            if odd is not None or not parts[0].shape:
                bad = odd or parts[0]
                raise ConversionError(
                    f"tensor {bad.name} has shape {show_shape(bad.shape)} of {bad.dtype}, unlike "
                    f"{parts[0].name} ({show_shape(parts[0].shape)} of {parts[0].dtype}): heads must be alike"
                )
            tensors[f"blocks.{block}.sa.heads.{kind}"] = StackedTensor(
                f"blocks.{block}.sa.heads.*.{{query,key,value}}.{kind}", parts
            )
    notes.append(f"{heads} heads of each block fused into one attn_qkv")
    return heads


def _settle_heads(found: int | None, options: ScratchOptions, checkpoint: Checkpoint) -> int:
    if found is None and options.heads is None:
        raise ConversionError(
            f"{checkpoint.path}: nothing in it tells the number of heads (it has no model_args); give heads="
        )
    if found is not None and options.heads not in (None, found):
        raise ConversionError(f"heads={options.heads} is given, but {checkpoint.path} says {found}")
    return options.heads or found or 1


def _take_output_bias(
    tensors: dict[str, LazyTensor], layout: Layout, notes: list[str]
) -> NDArray[np.float32] | None:
    tensor = tensors.pop(f"{layout.output}.bias", None)
    if tensor is None:
        return None
    if len(tensor.shape) != 1:
        raise ConversionError(
            f"tensor {tensor.name} has shape {show_shape(tensor.shape)}, not that of a bias"
        )
    embedding = tensors.get(f"{layout.embedding}.weight")
    if embedding is not None and embedding.shape[:1] != tensor.shape:
        raise ConversionError(
            f"{tensor.name} has {tensor.shape[0]} entries, but the embedding has the shape "
            f"{show_shape(embedding.shape)}"
        )
    bias = tensor.read_f32()
    bad = np.flatnonzero(~np.isfinite(bias))
    if bad.size:
        raise ConversionError(
            f"tensor {tensor.name} of {tensor.file} holds {bias[bad[0]]} at index [{bad[0]}]"
        )
    if not bias.any():
        notes.append(f"{tensor.name} is all zeros and left out")
        return None
    return bias


def _config(
    tensors: Mapping[str, LazyTensor],
    layout: Layout,
    heads: int,
    bias: NDArray[np.float32] | None,
    options: ScratchOptions,
) -> GPT2Config:
    def shape(name: str) -> tuple[int, int]:
        tensor = tensors.get(f"{name}.weight")
        if tensor is None:
            raise ConversionError(f"tensor {name}.weight is missing")
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise ConversionError(
                f"tensor {tensor.name} has shape {show_shape(tensor.shape)}, not a matrix's"
            )
        return tensor.shape[0], tensor.shape[1]

    vocab_size, width = shape(layout.embedding)
    positions, _ = shape(layout.positions)
    inner, _ = shape(f"{layout.block}.0.{layout.ffn_up}")
    rows, _ = shape(f"{layout.block}.0.{layout.attn_qkv}")
    if width % heads:
        raise ConversionError(f"n_embd {width} is not a multiple of {heads} heads, which GGUF's gpt2 needs")
    if rows != 3 * width:
        raise ConversionError(
            f"the heads have {rows // 3} elements together ({heads} heads of {rows // 3 // heads}), "
            f"but n_embd is {width}; GGUF's gpt2 needs them equal"
        )
    return GPT2Config(
        vocab_size=vocab_size,
        context_length=positions,
        embedding_length=width,
        feed_forward_length=inner,
        block_count=_block_numbers(tensors, layout),
        head_count=heads,
        norm_epsilon=_LAYER_NORM_EPS,
        activation=ACTIVATIONS[options.activation or "gelu"],
        output_bias=bias,
        scale_by_width=options.attention_scale == "embedding",
    )


def _check_against(arguments: Fields, config: GPT2Config) -> None:
    """model_args and tensors must tell the same sizes."""
    sizes: dict[str, Any] = {
        "n_layer": config.block_count,
        "n_embd": config.embedding_length,
        "block_size": config.context_length,
        "vocab_size": config.vocab_size,
    }
    for key, size in sizes.items():
        if arguments.has(key) and arguments.integer(key) != size:
            arguments.fail(f"{key} is {arguments.integer(key)}, but the tensors say {size}")


def _check_biases(tensors: Mapping[str, LazyTensor], layout: Layout) -> None:
    """A bias that some blocks have and block 0 has not would be dropped; the plan says so less clearly."""
    pattern = re.compile(re.escape(layout.block) + r"\.\d+\.(.+\.bias)")
    parts = {f"{part}.bias" for part in layout.parts.values()}
    for name in tensors:
        match = pattern.fullmatch(name)
        if match and match[1] in parts and f"{layout.block}.0.{match[1]}" not in tensors:
            raise ConversionError(f"tensor {name} is there, but {layout.block}.0.{match[1]} is missing")
