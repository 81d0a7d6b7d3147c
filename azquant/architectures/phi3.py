"""Phi 3, 3.5 and 4: Llama with fused QKV, gate and up in one matrix, RoPE over halves that may turn in part.

``longrope`` is written as llama.cpp reads it: a tensor of divisors for short and one for long contexts, and
the factor that both scale queries and keys by. transformers changes from the short to the long ones as a text
outgrows the original context; azquant runs the short ones, within the original context only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from azquant.architectures.base import Architecture, Constant, TensorRule, Weights
from azquant.architectures.blocks import DecoderProgram, decoder_rules, linear_rules, norm_rules
from azquant.architectures.decoder import (
    DecoderConfig,
    gguf_windows,
    hf_refuse,
    read_gguf,
    read_hf,
    window_metadata,
)
from azquant.architectures.fields import Fields, gguf_fields, hf_fields
from azquant.architectures.llama import DECODER_SIZES, INV_FREQ, window_warning
from azquant.architectures.rope import Rope, frequencies, hf_rope_section
from azquant.gguf import MetadataValue, keys
from azquant.program import ProgramSpec

__all__ = ["PHI3", "Phi3Config"]

LONGROPE = ("longrope", "su")


@dataclass(frozen=True)
class Phi3Config(DecoderConfig):
    """Hyperparameters of a Phi 3."""

    NAME: ClassVar[str] = "phi3"

    original_context: int = 0
    """Positions before RoPE was stretched; the context length where it was not."""
    rope_factor: float = 1.0
    """What longrope scales cosines and sines by."""
    short_divisors: tuple[float, ...] = ()
    """Checkpoint only: longrope's divisors within the original context."""
    long_divisors: tuple[float, ...] = ()
    """Checkpoint only: longrope's divisors beyond it."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Phi3Config:
        """From ``config.json``. Raises ConversionError for what is missing, impossible or not to be had."""
        fields = hf_fields(config)
        hf_refuse(fields, "phi3", hidden_act=("silu", "swish"), attention_bias=False)
        section = hf_rope_section(fields)
        stretched = section is not None and section.text("rope_type", "type", default="default") in LONGROPE
        rope = None
        if section is not None and stretched:
            holder = section if section.has("rope_theta") else fields
            rope = Rope(holder.number("rope_theta", default=10000.0))
        common = read_hf(fields, default_epsilon=1e-5, whole_width=True, partial_rope=1.0, rope=rope)
        context, window = common["context_length"], fields.integer("sliding_window", default=0, low=0)
        original = context
        longrope: dict[str, Any] = {}
        if section is not None and stretched:
            holder = section if section.has("original_max_position_embeddings") else fields
            original = holder.integer("original_max_position_embeddings", default=context)
            longrope = _longrope(section, common["rope_dimension"] // 2, context, original)
        return cls(
            **common,
            windows=(window,) * common["block_count"] if 0 < window < context else (),
            original_context=original,
            **longrope,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Phi3Config:
        """From GGUF metadata as plain values. Raises ModelError for what is missing or impossible.

        The context length of a model with longrope is its original one: see the head of this module.
        """
        fields = gguf_fields(metadata, "phi3")
        common = read_gguf(
            fields, honoured=("attention.sliding_window", "rope.scaling.attn_factor"), scalings=("longrope",)
        )
        context = common["context_length"]
        original = fields.integer("rope.scaling.original_context_length", default=context)
        if fields.has("rope.scaling.attn_factor"):
            common["context_length"] = min(context, original)
        return cls(
            **common,
            windows=gguf_windows(fields, common["block_count"]),
            original_context=original,
            rope_factor=fields.number("rope.scaling.attn_factor", default=1.0),
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """What llama.cpp will compute otherwise than this config says."""
        return window_warning(self)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the conversion changes beyond renaming, for the report."""
        if not self.short_divisors:
            return ()
        return (
            f"longrope: azquant runs the first {self.original_context} of {self.context_length} positions; "
            "llama.cpp runs all",
        )

    def own_metadata(self) -> dict[str, MetadataValue]:
        """Original context, sliding window (0 for none, as llama.cpp's converter writes it) and longrope."""
        found = {"rope.scaling.original_context_length": keys.u32(self.original_context)}
        found |= window_metadata(self.windows or (0,) * self.block_count)
        found.pop("attention.sliding_window_pattern", None)  # all layers or none
        if self.short_divisors:
            found["rope.scaling.attn_factor"] = keys.f32(self.rope_factor)
        return found


def _longrope(section: Fields, pairs: int, context: int, original: int) -> dict[str, Any]:
    """The divisors of each pair, and the factor, by the rule of the LongRoPE paper (arXiv 2402.13753)."""
    found: dict[str, Any] = {}
    for key, name in (("short_factor", "short_divisors"), ("long_factor", "long_divisors")):
        values = section.values.get(key)
        if not isinstance(values, list) or len(values) != pairs:
            section.fail(f"{key} must be a list of {pairs} numbers, one for each pair that RoPE turns")
        found[name] = tuple(Fields({key: v}, section.where, section.error).number(key) for v in values)
    stretch = section.number("factor", default=context / original)
    factor = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 and original > 1 else 1.0
    return {**found, "rope_factor": section.number("attention_factor", default=factor)}


def _block(config: Phi3Config, i: int) -> list[TensorRule]:
    width, inner = config.embedding_length, config.feed_forward_length
    blk, layer = f"blk.{i}", f"layers.{i}"
    all_rows = config.query_rows + 2 * config.kv_rows
    return [
        *norm_rules(f"{blk}.attn_norm", width, f"{layer}.input_layernorm"),
        *linear_rules(f"{blk}.attn_qkv", (all_rows, width), f"{layer}.self_attn.qkv_proj"),
        *linear_rules(f"{blk}.attn_output", (width, config.query_rows), f"{layer}.self_attn.o_proj"),
        *norm_rules(f"{blk}.ffn_norm", width, f"{layer}.post_attention_layernorm"),
        *linear_rules(f"{blk}.ffn_up", (2 * inner, width), f"{layer}.mlp.gate_up_proj"),
        *linear_rules(f"{blk}.ffn_down", (width, inner), f"{layer}.mlp.down_proj"),
    ]


def _rules(config: Phi3Config) -> list[TensorRule]:
    shape = (config.rope_dimension // 2,)
    turns = tuple(
        TensorRule(f"rope_factors_{name}.weight", shape, "", Constant(values), optional=not values)
        for name, values in (("long", config.long_divisors), ("short", config.short_divisors))
    )
    return decoder_rules(config, lambda i: _block(config, i), before=turns)


def _program(config: Phi3Config, weights: Weights) -> ProgramSpec[Any]:
    p = DecoderProgram(config, weights)
    divisors = weights.optional_vector("rope_factors_short.weight")
    turns = frequencies(config.rope, config.rope_dimension, divisors)
    p.embed()
    for i in range(config.block_count):
        blk = f"blk.{i}"
        p.norm(p.normed, p.x, f"{blk}.attn_norm")
        p.linear(p.query, p.normed, f"{blk}.attn_qkv")
        p.rope(turns, scale=config.rope_factor)
        p.attend(i)
        p.linear(p.x, p.attended, f"{blk}.attn_output", residual=p.x)
        p.norm(p.normed, p.x, f"{blk}.ffn_norm")
        p.gated_fused(p.x, p.normed, blk, residual=p.x)
    return p.finish()


PHI3 = Architecture(
    name="phi3",
    hf_names=("Phi3ForCausalLM",),
    config=Phi3Config,
    rules=_rules,
    program=_program,
    prefixes=("model.", ""),
    hf_sizes=DECODER_SIZES,
    harmless=(INV_FREQ,),
)
