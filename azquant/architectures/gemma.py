"""Gemma 2 and 3, text: norms before and after sublayers, scaled embedding, sliding windows, GELU gate.

Checkpoints hold norm weights less one; GGUF holds them whole. llama.cpp fixes the scale of the scores by the
model's size (1/sqrt(head size), and 1/sqrt(width per head) in the 27B models); a ``query_pre_attn_scalar``
that asks for another one is honoured by folding the difference into the queries: Gemma 2's projection,
Gemma 3's query norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from azquant.architectures.base import Architecture, ScaleRows, Shift, TensorRule, Transform, Weights
from azquant.architectures.blocks import KEEP, DecoderProgram, decoder_rules, linear_rules, norm_rules
from azquant.architectures.decoder import (
    DecoderConfig,
    gguf_windows,
    hf_refuse,
    hf_windows,
    read_gguf,
    read_hf,
    window_metadata,
)
from azquant.architectures.fields import Fields, gguf_fields, hf_fields
from azquant.architectures.llama import DECODER_SIZES, INV_FREQ
from azquant.architectures.rope import Rope, frequencies, hf_rope
from azquant.gguf import MetadataValue, keys
from azquant.program import ProgramSpec

__all__ = ["GEMMA2", "GEMMA3", "Gemma2Config", "Gemma3Config"]

SHIFT = Shift(1.0)
NO_CAP = 1e9
"""Soft-cap of a Gemma 2 that has none: llama.cpp always applies one, and this changes no fp32 number."""


@dataclass(frozen=True)
class Gemma2Config(DecoderConfig):
    """Hyperparameters of a Gemma 2."""

    NAME: ClassVar[str] = "gemma2"
    PERIOD: ClassVar[int] = 2
    """Of so many layers the last sees everything, where a file does not say."""
    LAYERS_27B: ClassVar[int] = 46
    """The number of layers by which llama.cpp tells the model with the other score scale."""

    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    query_scalar: float = 0.0
    """Checkpoint only: scores are divided by its square root; 0 for what llama.cpp does."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Gemma2Config:
        """From ``config.json``. Raises ConversionError for what is missing, impossible or not to be had."""
        fields = hf_fields(config)
        _refuse(fields, cls.NAME)
        common = read_hf(fields)
        layers = common["block_count"]
        window = fields.integer("sliding_window", default=4096, low=0)
        return cls(
            **common,
            windows=hf_windows(fields, layers, window, [i % 2 == 0 for i in range(layers)]),
            attention_softcap=_softcap(fields, "attn_logit_softcapping", 50.0, NO_CAP),
            logit_softcap=_softcap(fields, "final_logit_softcapping", 30.0, NO_CAP),
            query_scalar=fields.number("query_pre_attn_scalar", default=256),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Gemma2Config:
        """From GGUF metadata as plain values. Raises ModelError for what is missing or impossible."""
        fields = gguf_fields(metadata, "gemma2")
        common = read_gguf(fields, honoured=_HONOURED)
        return cls(
            **common,
            windows=gguf_windows(fields, common["block_count"], window=4096, period=cls.PERIOD),
            attention_softcap=_gguf_softcap(fields, "attn_logit_softcapping", 50.0),
            logit_softcap=_gguf_softcap(fields, "final_logit_softcapping", 30.0),
        )

    @property
    def score_scale(self) -> float:
        """What llama.cpp multiplies scores by."""
        wide = self.block_count == self.LAYERS_27B
        return 1 / math.sqrt(self.embedding_length // self.head_count if wide else self.head_dim)

    @property
    def query_factor(self) -> float:
        """What queries are multiplied by, so that :attr:`score_scale` is the scale left."""
        factor = 1 / math.sqrt(self.query_scalar) / self.score_scale if self.query_scalar else 1.0
        return 1.0 if math.isclose(factor, 1.0, rel_tol=1e-9) else factor

    @property
    def notes(self) -> tuple[str, ...]:
        """What the conversion changes beyond renaming, for the report."""
        if self.query_factor == 1.0:
            return ()
        return (
            f"query_pre_attn_scalar {self.query_scalar:g}: queries multiplied by {self.query_factor:.6g}",
        )

    def own_metadata(self) -> dict[str, MetadataValue]:
        """Soft-caps and sliding windows."""
        return {
            "attn_logit_softcapping": keys.f32(self.attention_softcap),
            "final_logit_softcapping": keys.f32(self.logit_softcap),
            **window_metadata(self.windows or (0,) * self.block_count, self.PERIOD),
        }


@dataclass(frozen=True)
class Gemma3Config(Gemma2Config):
    """Hyperparameters of a Gemma 3."""

    NAME: ClassVar[str] = "gemma3"
    PERIOD: ClassVar[int] = 6
    LAYERS_27B: ClassVar[int] = 62

    local_base: float = 10000.0
    """RoPE base of the layers with a window; they know no scaling."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Gemma3Config:
        """From ``config.json``. Raises ConversionError for what is missing, impossible or not to be had."""
        fields = hf_fields(config)
        _refuse(fields, cls.NAME)
        if fields.has("attn_logit_softcapping"):
            fields.fail("attn_logit_softcapping is set, but GGUF's gemma3 has no soft-cap on scores")
        whole, local = _ropes(fields)
        common = read_hf(fields, rope=whole)
        layers = common["block_count"]
        period = fields.integer("sliding_window_pattern", "_sliding_window_pattern", default=6)
        window = fields.integer("sliding_window", default=4096, low=0)
        return cls(
            **common,
            windows=hf_windows(fields, layers, window, [(i + 1) % period != 0 for i in range(layers)]),
            logit_softcap=_softcap(fields, "final_logit_softcapping", 0.0),
            query_scalar=fields.number("query_pre_attn_scalar", default=256),
            local_base=local.base,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Gemma3Config:
        """From GGUF metadata as plain values. Raises ModelError for what is missing or impossible."""
        fields = gguf_fields(metadata, "gemma3")
        common = read_gguf(fields, honoured=_HONOURED)
        return cls(
            **common,
            windows=gguf_windows(fields, common["block_count"], period=cls.PERIOD),
            logit_softcap=_gguf_softcap(fields, "final_logit_softcapping", 0.0),
            local_base=fields.number("rope.freq_base_swa", default=10000.0),
        )

    def own_metadata(self) -> dict[str, MetadataValue]:
        """Soft-cap, sliding windows and their RoPE base."""
        found: dict[str, MetadataValue] = {}
        if self.logit_softcap:
            found["final_logit_softcapping"] = keys.f32(self.logit_softcap)
        if self.windows:
            found |= window_metadata(self.windows, self.PERIOD)
            found["rope.freq_base_swa"] = keys.f32(self.local_base)
        return found


_HONOURED = ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping")


def _refuse(fields: Fields, name: str) -> None:
    hf_refuse(
        fields,
        name,
        hidden_activation=("gelu_pytorch_tanh", "gelu_new"),
        attention_bias=False,
        use_bidirectional_attention=False,
    )


def _softcap(fields: Fields, key: str, default: float, off: float = 0.0) -> float:
    """A soft-cap; null switches it off, silence means the default of transformers."""
    if key in fields.values and fields.values[key] is None:
        return off
    return fields.number(key, default=default) if default or fields.has(key) else off


def _gguf_softcap(fields: Fields, key: str, default: float) -> float:
    value = fields.values.get(fields.prefix + key)
    return 0.0 if value == 0 else fields.number(key) if fields.has(key) else default


def _ropes(fields: Fields) -> tuple[Rope, Rope]:
    """RoPE of the layers that see everything, and of those with a window."""
    both = fields.section("rope_parameters")
    kinds = ("default", "linear")
    if both is not None and both.has("full_attention"):
        head_dim = 2  # no scaling of these kinds depends on it
        sections = [both.section(key) for key in ("full_attention", "sliding_attention")]
        whole, local = (
            hf_rope(
                Fields({"rope_parameters": section.values if section else None}, both.where, both.error),
                head_dim,
                kinds,
                default_base=base,
            )
            for section, base in zip(sections, (1e6, 1e4), strict=True)
        )
        if local.scale != 1.0:
            both.fail(
                "sliding_attention is scaled, but GGUF's gemma3 scales only the layers without a window"
            )
        return whole, local
    return hf_rope(fields, 2, kinds, default_base=1e6), Rope(
        fields.number("rope_local_base_freq", default=1e4)
    )


def _block(config: Gemma2Config, i: int) -> list[TensorRule]:
    width, inner, factor = config.embedding_length, config.feed_forward_length, config.query_factor
    blk, layer = f"blk.{i}", f"layers.{i}"
    on_rows, on_norm = (factor, 1.0) if config.NAME == "gemma2" else (1.0, factor)

    def scaled(inner: Transform, rows: int, factor: float) -> Transform:
        return inner if factor == 1.0 else ScaleRows(inner, rows, factor)

    rules = [
        *norm_rules(f"{blk}.attn_norm", width, f"{layer}.input_layernorm", SHIFT),
        *linear_rules(
            f"{blk}.attn_q",
            (config.query_rows, width),
            f"{layer}.self_attn.q_proj",
            scaled(KEEP, config.query_rows, on_rows),
        ),
        *linear_rules(f"{blk}.attn_k", (config.kv_rows, width), f"{layer}.self_attn.k_proj"),
        *linear_rules(f"{blk}.attn_v", (config.kv_rows, width), f"{layer}.self_attn.v_proj"),
        *linear_rules(f"{blk}.attn_output", (width, config.query_rows), f"{layer}.self_attn.o_proj"),
    ]
    if config.NAME == "gemma3":
        dim, source = config.head_dim, f"{layer}.self_attn"
        rules += norm_rules(f"{blk}.attn_q_norm", dim, f"{source}.q_norm", scaled(SHIFT, dim, on_norm))
        rules += norm_rules(f"{blk}.attn_k_norm", dim, f"{source}.k_norm", SHIFT)
    return [
        *rules,
        *norm_rules(f"{blk}.post_attention_norm", width, f"{layer}.post_attention_layernorm", SHIFT),
        *norm_rules(f"{blk}.ffn_norm", width, f"{layer}.pre_feedforward_layernorm", SHIFT),
        *linear_rules(f"{blk}.ffn_gate", (inner, width), f"{layer}.mlp.gate_proj"),
        *linear_rules(f"{blk}.ffn_up", (inner, width), f"{layer}.mlp.up_proj"),
        *linear_rules(f"{blk}.ffn_down", (width, inner), f"{layer}.mlp.down_proj"),
        *norm_rules(f"{blk}.post_ffw_norm", width, f"{layer}.post_feedforward_layernorm", SHIFT),
    ]


def _rules(config: Gemma2Config) -> list[TensorRule]:
    last = norm_rules("output_norm", config.embedding_length, "norm", SHIFT)
    return decoder_rules(config, lambda i: _block(config, i), norm=last)


def _program(config: Gemma2Config, weights: Weights) -> ProgramSpec[Any]:
    p = DecoderProgram(config, weights)
    width = config.embedding_length
    local = p.frequencies
    if isinstance(config, Gemma3Config):
        local = frequencies(Rope(config.local_base), config.rope_dimension)
    p.embed(scale=math.sqrt(width))
    for i in range(config.block_count):
        blk = f"blk.{i}"
        p.norm(p.normed, p.x, f"{blk}.attn_norm")
        p.project(blk, p.normed)
        if config.NAME == "gemma3":
            p.norm_heads(blk)
        p.rope(local if config.window(i) else p.frequencies)
        p.attend(i, scale=config.score_scale, softcap=config.attention_softcap)
        p.linear(p.normed, p.attended, f"{blk}.attn_output")
        p.norm(p.normed, p.normed, f"{blk}.post_attention_norm")
        p.b.add(p.x, p.normed, p.x, width)
        p.norm(p.normed, p.x, f"{blk}.ffn_norm")
        p.gated(p.normed, p.normed, blk, "gelu_tanh")
        p.norm(p.normed, p.normed, f"{blk}.post_ffw_norm")
        p.b.add(p.x, p.normed, p.x, width)
    return p.finish(softcap=config.logit_softcap)


GEMMA2 = Architecture(
    name="gemma2",
    hf_names=("Gemma2ForCausalLM",),
    config=Gemma2Config,
    rules=_rules,
    program=_program,
    prefixes=("model.", ""),
    hf_sizes=DECODER_SIZES,
    harmless=(INV_FREQ,),
    head="tied",
)

GEMMA3 = Architecture(
    name="gemma3",
    hf_names=("Gemma3ForCausalLM",),
    model_types=("gemma3_text",),
    config=Gemma3Config,
    rules=_rules,
    program=_program,
    prefixes=("model.", ""),
    hf_sizes=DECODER_SIZES,
    harmless=(INV_FREQ,),
)
