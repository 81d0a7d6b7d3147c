"""Which type each tensor of a quantized file gets: the choices of llama-quantize, tensor by tensor.

A target such as ``q4_k_m`` is a recipe, not one type: the output head keeps more bits, tensors whose errors
hurt most keep more, and rows that no block fits fall back. Source of the rules: llama-quant.cpp of llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from azquant.errors import ArgumentError, UnsupportedTypeError
from azquant.gguf import keys
from azquant.types import TYPES, GGMLType, get_type

__all__ = ["TARGETS", "Choice", "Model", "Options", "Target", "Weight", "choose_types", "get_target"]


@dataclass(frozen=True)
class Target:
    """What a file can be quantized to."""

    name: str
    file_type: int
    """The number of ``general.file_type``."""
    type: GGMLType
    """The type of the tensors that no rule singles out."""

    def __str__(self) -> str:
        return self.name


def _targets() -> dict[str, Target]:
    rows = (
        ("f32", 0, "f32"),
        ("f16", 1, "f16"),
        ("q4_0", 2, "q4_0"),
        ("q4_1", 3, "q4_1"),
        ("q8_0", 7, "q8_0"),
        ("q5_0", 8, "q5_0"),
        ("q5_1", 9, "q5_1"),
        ("q2_k", 10, "q2_k"),
        ("q3_k_s", 11, "q3_k"),
        ("q3_k_m", 12, "q3_k"),
        ("q3_k_l", 13, "q3_k"),
        ("q4_k_s", 14, "q4_k"),
        ("q4_k_m", 15, "q4_k"),
        ("q5_k_s", 16, "q5_k"),
        ("q5_k_m", 17, "q5_k"),
        ("q6_k", 18, "q6_k"),
        ("q2_k_s", 21, "q2_k"),
        ("iq4_nl", 25, "iq4_nl"),
        ("iq4_xs", 30, "iq4_xs"),
        ("bf16", 32, "bf16"),
        ("tq1_0", 36, "tq1_0"),
        ("tq2_0", 37, "tq2_0"),
        ("mxfp4_moe", 38, "mxfp4"),
    )
    return {name: Target(name, number, TYPES[type_]) for name, number, type_ in rows}


TARGETS: dict[str, Target] = _targets()
"""Every target by its name."""

_ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m", "mxfp4": "mxfp4_moe"}


def get_target(name: str | GGMLType | Target) -> Target:
    """The target called ``name`` (any case; ``q4_k`` means ``q4_k_m``). Raises UnsupportedTypeError."""
    if isinstance(name, Target):
        return name
    asked = str(name).lower() if isinstance(name, (str, GGMLType)) else ""
    found = TARGETS.get(_ALIASES.get(asked, asked))
    if found is None:
        raise UnsupportedTypeError(f"cannot make {name} files; known are {', '.join(TARGETS)}")
    return found


@dataclass(frozen=True)
class Model:
    """What the rules ask of a model."""

    architecture: str
    n_layer: int
    n_expert: int = 0
    n_head: int = 1
    n_head_kv: int = 1

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Model:
        """Read from a GGUF file's keys; what is missing counts as absent."""
        name = metadata.get(keys.ARCHITECTURE, "")
        architecture = name if isinstance(name, str) else ""

        def number(key: str, default: int) -> int:
            value = metadata.get(f"{architecture}.{key}", default)
            if not isinstance(value, (bool, int, str)) and len(value := list(value)) > 0:
                value = value[0]  # one for each layer: the first speaks for all, as in llama.cpp
            return value if isinstance(value, int) else default

        n_head = number("attention.head_count", 1)
        return cls(
            architecture,
            number("block_count", 0),
            number("expert_count", 0),
            n_head,
            number("attention.head_count_kv", n_head),
        )

    @property
    def grouped(self) -> bool:
        """Whether at least four query heads share one head of keys and values."""
        return self.n_head_kv > 0 and self.n_head // self.n_head_kv >= 4

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes it for a 70B model."""
        if self.architecture == "llama":
            return self.n_layer == 80 and self.n_head != self.n_head_kv
        return (self.architecture, self.n_layer) in (("deci", 80), ("olmo", 80), ("qwen2", 80), ("jais2", 68))


@dataclass(frozen=True)
class Weight:
    """A tensor to be given a type."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType | None
    """The type it has; ``None`` in a checkpoint, where what is not quantized becomes f32."""


@dataclass(frozen=True)
class Choice:
    """The type of one tensor."""

    type: GGMLType
    reason: str = ""
    """Why it is not the target's; empty when it is."""
    fallback: bool = False
    """Whether a type gave way because its blocks do not fit the rows. (A head in q8_0 for q6_k is none.)"""


@dataclass(frozen=True)
class Options:
    """What overrides the rules. Patterns are searched in the name, the first that is found decides."""

    pure: bool = False
    output_type: GGMLType | None = None
    token_embedding_type: GGMLType | None = None
    tensor_types: tuple[tuple[re.Pattern[str], GGMLType], ...] = ()
    has_imatrix: bool = False

    @classmethod
    def parse(
        cls,
        *,
        pure: bool,
        output_type: str | GGMLType | None,
        token_embedding_type: str | GGMLType | None,
        tensor_types: Iterable[tuple[str, str | GGMLType]],
        has_imatrix: bool,
    ) -> Options:
        """From what a caller gives. Raises ArgumentError and UnsupportedTypeError."""
        patterns = []
        for pattern, name in tensor_types:
            try:
                patterns.append((re.compile(pattern, re.IGNORECASE), _writable(name)))
            except re.error as error:
                raise ArgumentError(f"tensor type {pattern!r}: {error} in the regular expression") from None
        return cls(
            pure,
            None if output_type is None else _writable(output_type),
            None if token_embedding_type is None else _writable(token_embedding_type),
            tuple(patterns),
            has_imatrix,
        )


def _writable(name: str | GGMLType) -> GGMLType:
    found = get_type(name)
    if not found.can_quantize:
        raise UnsupportedTypeError(f"azquant cannot quantize to {found}")
    return found


_KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj"
    r"|ssm_conv1d|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight"
    r"|time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)\.weight"
    r"|attn_rel_b\.weight|\.position_embd|sam\.pos_embd|sam\.neck\.|sam\.net_|\.rel_pos|\.patch_embd"
    r"|\.patch_merger|a\.rvq\.codebook|mm\.a\.code_embd"
)
_KEPT_NAMES = ("position_embd.weight", "token_types.weight")
_LAYER = re.compile(r"blk\.(\d+)\.")
_HEAD = "output.weight"
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_CATEGORIES = (
    ("attn_qkv.weight", "qkv"),
    ("attn_kv_b.weight", "kv_b"),
    ("attn_v.weight", "v"),
    ("attn_k.weight", "k"),
    ("attn_q.weight", "q"),
    ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"),
    ("ffn_gate", "ffn_gate"),
    ("ffn_down", "ffn_down"),
)
_VALUES = ("v", "qkv", "kv_b")

# What a type whose block does not fit the rows gives way to.
_NARROWER = {
    "iq4_xs": "iq4_nl",
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "tq1_0": "q4_0",
    "tq2_0": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}


def choose_types(
    weights: Sequence[Weight], target: Target, model: Model, options: Options | None = None
) -> dict[str, Choice]:
    """The type of every tensor, by name. ``weights`` are all tensors of the model."""
    recipe = _Recipe(target, model, options or Options(), [weight.name for weight in weights])
    # Counted layer by layer, whatever the order in the file.
    ordered = sorted(weights, key=lambda weight: (_layer(weight.name), weight.name))
    return {weight.name: recipe.choose(weight) for weight in ordered}


def _layer(name: str) -> int:
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


def _category(name: str) -> str:
    if name == _HEAD:
        return "head"
    if name in _EMBEDDINGS:
        return "embedding"
    return next((category for part, category in _CATEGORIES if part in name), "")


def _why_kept(weight: Weight) -> str:
    """Why a tensor is never quantized; empty when it may be."""
    sizes = [n for n in weight.shape[:-1] if n != 1]
    if not sizes:  # one row at most
        return "a norm" if "norm" in weight.name else "a bias" if weight.name.endswith("bias") else "one row"
    if weight.name in _KEPT_NAMES or ".position_embd" in weight.name:
        return "positions"
    if not weight.name.endswith("weight") or _KEPT.search(weight.name):
        return "a norm" if "norm" in weight.name else "small or delicate"
    return ""


@dataclass
class _Recipe:
    target: Target
    model: Model
    options: Options
    names: Sequence[str]
    seen_values: int = 0
    seen_down: int = 0
    tied: bool = field(init=False)
    n_values: int = field(init=False)

    def __post_init__(self) -> None:
        self.tied = _HEAD not in self.names
        self.n_values = sum(_category(name) in _VALUES for name in self.names)

    def choose(self, weight: Weight) -> Choice:
        kept = _why_kept(weight)
        if kept:
            type_ = weight.type or TYPES["f32"]
            why = f"{kept}: always f32" if weight.type is None else f"{kept}: never quantized"
            return Choice(type_, "" if type_ is self.target.type else why)
        category = _category(weight.name)
        options = self.options
        if (
            options.token_embedding_type is not None
            and category == "embedding"
            and not (weight.name != "token_embd.weight" and self._manual(weight.name))
        ):
            return self._fitted(options.token_embedding_type, weight, "as asked", strict=True)
        if options.output_type is not None and category == "head":
            return self._fitted(options.output_type, weight, "as asked", strict=True)
        if not self.target.type.is_quantized:
            return Choice(self.target.type)
        manual = self._manual(weight.name)
        if manual is not None:
            return self._fitted(manual, weight, "as asked")
        if options.pure:
            return self._fitted(self.target.type, weight, "")
        name = self._mixture(weight, category)
        return self._fitted(TYPES[name], weight, _REASONS.get(category, "llama-quantize's mixture"))

    def _manual(self, name: str) -> GGMLType | None:
        return next((type_ for pattern, type_ in self.options.tensor_types if pattern.search(name)), None)

    def _fitted(self, type_: GGMLType, weight: Weight, reason: str, *, strict: bool = False) -> Choice:
        columns = weight.shape[-1]
        if columns % type_.block_size == 0:
            return Choice(type_, "" if type_ is self.target.type else reason)
        if strict:
            type_.row_bytes(columns)  # a type asked for by name does not give way
        narrower = TYPES[_NARROWER.get(type_.name, type_.name)]
        if columns % narrower.block_size:
            narrower = TYPES["f16"]
        why = f"rows of {columns} are no whole number of {type_} blocks ({type_.block_size})"
        if type_.name == "q6_k" and narrower.name == "q8_0" and reason in _REASONS.values():
            return Choice(narrower, f"{reason}: {why}")  # the head, with more bits than planned: no loss
        return Choice(narrower, why, fallback=True)

    def _mixture(self, weight: Weight, category: str) -> str:
        """The name of the type that the target's mixture gives."""
        target, model, default = self.target.name, self.model, self.target.type.name
        if category == "head" or (self.tied and category == "embedding"):
            return self._head(weight)
        if target == "mxfp4_moe":
            return "mxfp4" if len(weight.shape) > 2 and weight.shape[0] > 1 else "q8_0"
        if category == "embedding":
            return "q4_k" if target in ("tq1_0", "tq2_0") else default
        if category in _VALUES:
            return self._values()
        if category == "k":
            return "q8_0" if model.n_expert == 8 else default
        if category == "ffn_down":
            return self._down(weight.name)
        if category == "attn_output":
            return self._attention_output()
        return default

    def _head(self, weight: Weight) -> str:
        default = self.target.type
        if self.options.output_type is not None:
            return self.options.output_type.name
        if self.target.name == "mxfp4_moe" or self.model.architecture == "falcon":
            return "q8_0"
        if weight.shape[-1] % default.block_size or default.name == "q8_0":
            return "q8_0"
        return "q6_k"

    def _values(self) -> str:
        """Attention values, also those stored with queries and keys."""
        target, model, type_ = self.target.name, self.model, self.target.type.name
        seen, self.seen_values = self.seen_values, self.seen_values + 1
        if target == "q2_k":
            type_ = "q4_k" if model.grouped else "q3_k"
        elif target == "q2_k_s" and model.grouped:
            type_ = "q4_k"
        elif target == "q3_k_m":
            type_ = "q5_k" if seen < 2 else "q4_k"
        elif target == "q3_k_l" or (target in ("iq4_nl", "iq4_xs") and model.grouped):
            type_ = "q5_k"
        elif target in ("q4_k_m", "q5_k_m") and _gets_more(seen, self.n_values):
            type_ = "q6_k"
        elif target == "q4_k_s" and seen < 4:
            type_ = "q5_k"
        if model.is_70b and type_ in ("q3_k", "q4_k"):
            type_ = "q5_k"
        return "q8_0" if model.n_expert == 8 else type_

    def _down(self, name: str) -> str:
        target, model, type_ = self.target.name, self.model, self.target.type.name
        layer, layers = self.seen_down, model.n_layer
        self.seen_down += 1
        if model.n_expert > 1:
            layer = _layer(name)
        falcon = model.architecture == "falcon"
        early = layer < layers // 8
        if target == "q2_k":
            return "q3_k"
        if target == "q3_k_m":
            if layer < layers // 16:
                return "q5_k"
            return "q4_k" if not falcon or _gets_more(layer, layers) else type_
        if target == "q3_k_l":
            return "q4_k" if falcon else "q5_k"
        if target == "q4_k_m" and falcon:
            return "q6_k" if layer < layers // 16 else "q5_k" if _gets_more(layer, layers) else type_
        if target in ("q4_k_m", "q5_k_m"):
            return "q6_k" if _gets_more(layer, layers) else type_
        raised = {
            "q2_k_s": early,
            "iq4_nl": early and not self.options.has_imatrix,
            "iq4_xs": early and not self.options.has_imatrix,
            "q4_k_s": early and not falcon,
            # With an importance matrix the first ones can go astray at 4 and 5 bits.
            "q4_0": early and self.options.has_imatrix,
            "q5_0": early and self.options.has_imatrix,
        }
        to = {"q2_k_s": "q4_k", "q4_0": "q4_1", "q5_0": "q5_1"}
        return to.get(target, "q5_k") if raised.get(target, False) else type_

    def _attention_output(self) -> str:
        target, model, type_ = self.target.name, self.model, self.target.type.name
        if model.architecture == "falcon":
            return "q4_k" if target == "q3_k_l" else type_
        if model.n_expert == 8:
            raised = ("q2_k", "q3_k_s", "q3_k_m", "iq4_nl", "q4_k_s", "q4_k_m", "iq4_xs")
            return "q5_k" if target in raised else type_
        return {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(target, type_)


_REASONS = {"head": "the output head", "embedding": "the embedding, also the output head"}


def _gets_more(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between them."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
