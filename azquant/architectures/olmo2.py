"""OLMo 2: norms after each sublayer instead of before, queries and keys normed over their whole width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from azquant.architectures.base import Architecture, TensorRule, Weights
from azquant.architectures.blocks import DecoderProgram, decoder_rules, linear_rules, norm_rules
from azquant.architectures.decoder import DecoderConfig, hf_refuse, read_gguf, read_hf
from azquant.architectures.fields import gguf_fields, hf_fields
from azquant.architectures.llama import DECODER_SIZES, INV_FREQ
from azquant.program import ProgramSpec

__all__ = ["OLMO2", "Olmo2Config"]


@dataclass(frozen=True)
class Olmo2Config(DecoderConfig):
    """Hyperparameters of an OLMo 2."""

    NAME: ClassVar[str] = "olmo2"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Olmo2Config:
        """From ``config.json``. Raises ConversionError for what is missing, impossible or not to be had."""
        fields = hf_fields(config)
        hf_refuse(fields, "olmo2", hidden_act=("silu", "swish"), attention_bias=False)
        return cls(**read_hf(fields, default_epsilon=1e-5, whole_width=True))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Olmo2Config:
        """From GGUF metadata as plain values. Raises ModelError for what is missing or impossible."""
        return cls(**read_gguf(gguf_fields(metadata, "olmo2")))


def _block(config: Olmo2Config, i: int) -> list[TensorRule]:
    width, inner = config.embedding_length, config.feed_forward_length
    blk, layer = f"blk.{i}", f"layers.{i}"
    q, kv = config.query_rows, config.kv_rows
    return [
        *linear_rules(f"{blk}.attn_q", (q, width), f"{layer}.self_attn.q_proj"),
        *linear_rules(f"{blk}.attn_k", (kv, width), f"{layer}.self_attn.k_proj"),
        *linear_rules(f"{blk}.attn_v", (kv, width), f"{layer}.self_attn.v_proj"),
        *linear_rules(f"{blk}.attn_output", (width, q), f"{layer}.self_attn.o_proj"),
        *norm_rules(f"{blk}.attn_q_norm", q, f"{layer}.self_attn.q_norm"),
        *norm_rules(f"{blk}.attn_k_norm", kv, f"{layer}.self_attn.k_norm"),
        *norm_rules(f"{blk}.post_attention_norm", width, f"{layer}.post_attention_layernorm"),
        *linear_rules(f"{blk}.ffn_gate", (inner, width), f"{layer}.mlp.gate_proj"),
        *linear_rules(f"{blk}.ffn_up", (inner, width), f"{layer}.mlp.up_proj"),
        *linear_rules(f"{blk}.ffn_down", (width, inner), f"{layer}.mlp.down_proj"),
        *norm_rules(f"{blk}.post_ffw_norm", width, f"{layer}.post_feedforward_layernorm"),
    ]


def _rules(config: Olmo2Config) -> list[TensorRule]:
    return decoder_rules(config, lambda i: _block(config, i))


def _program(config: Olmo2Config, weights: Weights) -> ProgramSpec[Any]:
    p = DecoderProgram(config, weights)
    width = config.embedding_length
    p.embed()
    for i in range(config.block_count):
        blk = f"blk.{i}"
        p.project(blk, p.x)
        p.norm(p.query, p.query, f"{blk}.attn_q_norm")
        p.norm(p.key, p.key, f"{blk}.attn_k_norm")
        p.rope()
        p.attend(i)
        p.linear(p.normed, p.attended, f"{blk}.attn_output")
        p.norm(p.normed, p.normed, f"{blk}.post_attention_norm")
        p.b.add(p.x, p.normed, p.x, width)
        p.gated(p.normed, p.x, blk)
        p.norm(p.normed, p.normed, f"{blk}.post_ffw_norm")
        p.b.add(p.x, p.normed, p.x, width)
    return p.finish()


OLMO2 = Architecture(
    name="olmo2",
    hf_names=("Olmo2ForCausalLM",),
    config=Olmo2Config,
    rules=_rules,
    program=_program,
    prefixes=("model.", ""),
    hf_sizes=DECODER_SIZES,
    harmless=(INV_FREQ,),
    head="required",
)
