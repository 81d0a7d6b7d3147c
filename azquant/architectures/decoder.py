"""What the decoders with rotary positions have in common: their hyperparameters, read and written.

An architecture's config adds its own fields to :class:`DecoderConfig`; :func:`read_hf` and :func:`read_gguf`
give the common ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from azquant.architectures.experts import Experts
from azquant.architectures.fields import MAX_BLOCKS, Fields, gguf_vocab_size
from azquant.architectures.rope import FLAT_KEYS, Rope, hf_rope, hf_rope_section
from azquant.gguf import MetadataValue, ValueType, keys

__all__ = [
    "DecoderConfig",
    "gguf_windows",
    "hf_refuse",
    "hf_windows",
    "read_gguf",
    "read_hf",
    "window_metadata",
]

RMS_EPSILON = "attention.layer_norm_rms_epsilon"
LAYER_EPSILON = "attention.layer_norm_epsilon"

# Keys that change what is computed; an architecture honours those it names, the rest are refused.
_COMPUTING_KEYS = (
    "attention.causal",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "attention.sliding_window",
    "attn_logit_softcapping",
    "embedding_scale",
    "expert_count",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "rope.scaling.attn_factor",
)


@dataclass(frozen=True)
class DecoderConfig:
    """Hyperparameters of a decoder with rotary positions."""

    NAME: ClassVar[str]
    """As ``general.architecture`` has it."""
    EPSILON: ClassVar[str] = RMS_EPSILON
    """Key of the norms' epsilon, which also says whether they are RMSNorm or LayerNorm."""

    vocab_size: int
    context_length: int
    embedding_length: int
    feed_forward_length: int
    block_count: int
    head_count: int
    head_count_kv: int
    head_dim: int
    norm_epsilon: float
    rope_dimension: int
    """Leading elements of each head that RoPE turns."""
    rope: Rope
    """Read from a file, it has no divisors: the file holds them as ``rope_freqs.weight``, if any."""
    tied: bool | None = None
    """Whether the embedding is also the output head; ``None`` when only the tensors tell."""
    windows: tuple[int, ...] = ()
    """Positions that a token sees in each layer, its own included; 0 for all, empty for all everywhere."""
    experts: Experts | None = None
    """What every layer has instead of one feed-forward network."""

    @property
    def query_rows(self) -> int:
        """Rows of the query projection."""
        return self.head_count * self.head_dim

    @property
    def kv_rows(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.head_count_kv * self.head_dim

    @property
    def notes(self) -> tuple[str, ...]:
        """What the conversion changes beyond renaming, for the report."""
        return ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What llama.cpp will compute otherwise than this config says."""
        return ()

    def window(self, layer: int) -> int:
        """Positions that a token sees in ``layer``; 0 for all."""
        return self.windows[layer] if self.windows else 0

    def metadata(self) -> dict[str, MetadataValue]:
        """The ``<arch>.*`` keys of the GGUF file."""
        found = {
            "vocab_size": keys.u32(self.vocab_size),
            "context_length": keys.u32(self.context_length),
            "embedding_length": keys.u32(self.embedding_length),
            "feed_forward_length": keys.u32(self.feed_forward_length),
            "block_count": keys.u32(self.block_count),
            "attention.head_count": keys.u32(self.head_count),
            "attention.head_count_kv": keys.u32(self.head_count_kv),
            "attention.key_length": keys.u32(self.head_dim),
            "attention.value_length": keys.u32(self.head_dim),
            self.EPSILON: keys.f32(self.norm_epsilon),
            "rope.dimension_count": keys.u32(self.rope_dimension),
            "rope.freq_base": keys.f32(self.rope.base),
        }
        if self.rope.scale != 1.0:
            found["rope.scaling.type"] = keys.string("linear")
            found["rope.scaling.factor"] = keys.f32(self.rope.scale)
        if self.experts is not None:
            found |= self.experts.metadata()
        found |= self.own_metadata()
        return {f"{self.NAME}.{key}": value for key, value in found.items()}

    def own_metadata(self) -> dict[str, MetadataValue]:
        """The keys that only this architecture has, without its name before them."""
        return {}


# ---- Hugging Face ------------------------------------------------------------------------------------------


def hf_refuse(fields: Fields, name: str, **expected: Any) -> None:
    """Refuse every key that is present with another value than the one ``name``'s graph computes."""
    for key, value in expected.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if fields.has(key) and fields.values[key] not in allowed:
            fields.fail(
                f"{key} is {fields.values[key]!r:.60}, but GGUF's {name} computes only "
                f"{' or '.join(map(repr, allowed))}"
            )


def read_hf(
    fields: Fields,
    *,
    kinds: Sequence[str] = ("default", "linear"),
    epsilon: Sequence[str] = ("rms_norm_eps",),
    default_epsilon: float = 1e-6,
    whole_width: bool = False,
    partial_rope: float | None = None,
    rope: Rope | None = None,
    rope_keys: tuple[str, str] = FLAT_KEYS,
) -> dict[str, Any]:
    """The common hyperparameters of a ``config.json``, as keyword arguments of a :class:`DecoderConfig`.

    ``kinds`` are the RoPE scalings that GGUF has for this architecture; ``rope`` is given where it is not in
    the usual keys, ``rope_keys`` where those beside ``rope_scaling`` have names of their own.
    ``whole_width``: the heads together must be as wide as the model. ``partial_rope`` is the default share of
    each head that turns, where it may be less than all.
    """
    width = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    heads_kv = fields.integer("num_key_value_heads", default=heads)
    fields.divides(heads_kv, "num_key_value_heads", heads, "num_attention_heads")
    if fields.has("head_dim"):
        head_dim = fields.integer("head_dim")
    else:
        head_dim = fields.divides(heads, "num_attention_heads", width, "hidden_size")
    if whole_width and head_dim * heads != width:
        fields.fail(
            f"head_dim {head_dim} times num_attention_heads {heads} is not hidden_size {width}, which GGUF's "
            "graph of this architecture requires"
        )
    turned = head_dim
    if partial_rope is not None:
        share = fields.number(rope_keys[1], default=partial_rope)
        section = hf_rope_section(fields)
        if section is not None:
            share = section.number("partial_rotary_factor", default=share)
        turned = int(head_dim * share)
    if turned % 2 or not 0 < turned <= head_dim:
        fields.fail(
            f"the head size is {head_dim}, of which RoPE turns {turned}; it turns pairs: that must be even"
            if turned != head_dim
            else f"the head size is {head_dim}, but RoPE turns pairs: it must be even"
        )
    return {
        "vocab_size": fields.integer("vocab_size"),
        "context_length": fields.integer("max_position_embeddings"),
        "embedding_length": width,
        "feed_forward_length": fields.integer("intermediate_size"),
        "block_count": fields.integer("num_hidden_layers", high=MAX_BLOCKS),
        "head_count": heads,
        "head_count_kv": heads_kv,
        "head_dim": head_dim,
        "norm_epsilon": fields.number(*epsilon, default=default_epsilon),
        "rope_dimension": turned,
        "rope": rope or hf_rope(fields, turned, kinds, partial=partial_rope is not None, flat_keys=rope_keys),
        "tied": fields.flag("tie_word_embeddings") if fields.has("tie_word_embeddings") else None,
    }


def hf_windows(fields: Fields, layers: int, window: int, default: Sequence[bool]) -> tuple[int, ...]:
    """Each layer's window: ``window`` in the layers that ``layer_types`` (else ``default``) calls sliding."""
    kinds = fields.values.get("layer_types")
    if kinds is None:
        sliding = list(default)
    else:
        known = {"sliding_attention": True, "full_attention": False}
        if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
            fields.fail(
                f"layer_types is {kinds!r:.60}, not a list of {layers} times "
                "'full_attention' or 'sliding_attention'"
            )
        sliding = [known[kind] for kind in kinds]
    return tuple(window if slides else 0 for slides in sliding) if window and any(sliding) else ()


# ---- GGUF --------------------------------------------------------------------------------------------------


def read_gguf(
    fields: Fields, *, epsilon: str = RMS_EPSILON, honoured: Sequence[str] = (), scalings: Sequence[str] = ()
) -> dict[str, Any]:
    """The common hyperparameters of a GGUF file, as keyword arguments of a :class:`DecoderConfig`.

    Keys that change what is computed are refused unless they are among ``honoured``; so are RoPE scalings
    beyond none, linear and ``scalings``.
    """
    for key in _COMPUTING_KEYS:
        value = fields.values.get(fields.prefix + key)
        harmless = value is None or (value == 0 and value is not False) or value is True
        if key not in honoured and not harmless:
            fields.fail(f"{fields.prefix}{key} is {value!r:.60}, which is not supported")
    width = fields.integer("embedding_length")
    heads = fields.integer("attention.head_count")
    heads_kv = fields.integer("attention.head_count_kv", default=heads)
    fields.divides(heads_kv, "attention.head_count_kv", heads, "attention.head_count")
    if fields.has("attention.key_length"):
        head_dim = fields.integer("attention.key_length")
    else:
        head_dim = fields.divides(heads, "attention.head_count", width, "embedding_length")
    if fields.integer("attention.value_length", default=head_dim) != head_dim:
        fields.fail(
            f"{fields.prefix}attention.value_length differs from the key length, which is not supported"
        )
    turned = fields.integer("rope.dimension_count", default=head_dim)
    if turned % 2 or turned > head_dim:
        fields.fail(
            f"{fields.prefix}rope.dimension_count is {turned}; it must be even and at most {head_dim}, "
            "the head size"
        )
    # llama.cpp's default is linear; scale_linear is how the first files wrote the factor.
    scaling = fields.text("rope.scaling.type", default="linear")
    known = ("none", "linear", *scalings)
    if scaling not in known:
        fields.fail(f"{fields.prefix}rope.scaling.type is {scaling!r}; known are {' and '.join(known)}")
    scale = fields.number("rope.scaling.factor", "rope.scale_linear", default=1.0)
    return {
        "vocab_size": gguf_vocab_size(fields),
        "context_length": fields.integer("context_length"),
        "embedding_length": width,
        "feed_forward_length": fields.integer("feed_forward_length"),
        "block_count": fields.integer("block_count", high=MAX_BLOCKS),
        "head_count": heads,
        "head_count_kv": heads_kv,
        "head_dim": head_dim,
        "norm_epsilon": fields.number(epsilon),
        "rope_dimension": turned,
        "rope": Rope(fields.number("rope.freq_base", default=10000.0), scale if scaling == "linear" else 1.0),
    }


def _periodic(layers: int, period: int) -> tuple[bool, ...]:
    """llama.cpp's pattern: of every ``period`` layers the last sees all; 0 means that every layer slides."""
    return tuple(period == 0 or i % period < period - 1 for i in range(layers))


def gguf_windows(fields: Fields, layers: int, *, window: int = 0, period: int = 0) -> tuple[int, ...]:
    """Each layer's window by ``attention.sliding_window`` and its pattern; ``window``, ``period``: defaults.

    The pattern is a number (see :func:`window_metadata`) or a list with a flag for each layer.
    """
    window = fields.integer("attention.sliding_window", default=window, low=0)
    key = f"{fields.prefix}attention.sliding_window_pattern"
    pattern: Any = fields.values.get(key)
    if pattern is not None and not isinstance(pattern, (int, str)) and isinstance(pattern, Sequence):
        sliding = tuple(bool(flag) for flag in pattern)
        if len(sliding) != layers:
            fields.fail(f"{key} has {len(sliding)} entries, but the model has {layers} layers")
    else:
        sliding = _periodic(layers, fields.integer("attention.sliding_window_pattern", default=period, low=0))
    return tuple(window if slides else 0 for slides in sliding) if window and any(sliding) else ()


def window_metadata(windows: Sequence[int], period: int = 0) -> dict[str, MetadataValue]:
    """The keys of sliding windows: the size, and the pattern where it is not ``period``, the default.

    llama.cpp reads the pattern as a number n (of every n layers the last one sees everything) or, in newer
    versions, as a list with a flag for each layer; a number is written wherever one can say it.
    """
    layers = len(windows)
    sliding = tuple(size > 0 for size in windows)
    found = {"attention.sliding_window": keys.u32(max(windows, default=0))}
    if sliding == _periodic(layers, period):
        return found
    said = next((n for n in range(layers + 1) if sliding == _periodic(layers, n)), None)
    found["attention.sliding_window_pattern"] = (
        keys.array(ValueType.BOOL, list(sliding)) if said is None else keys.u32(said)
    )
    return found
