"""Qwen 2, 2.5 and 3: Llama with RoPE over halves; Qwen 2 has biases on q, k, v, Qwen 3 norms on every head.

Qwen 3's mixtures have experts in every layer, whose shares sum to 1: llama.cpp knows no others.

Sliding windows (``use_sliding_window``) are written and honoured by azquant; llama.cpp has none here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from azquant.architectures.base import Architecture, TensorRule, Weights
from azquant.architectures.blocks import DecoderProgram, decoder_rules, linear_rules, norm_rules
from azquant.architectures.decoder import (
    DecoderConfig,
    gguf_windows,
    hf_refuse,
    hf_windows,
    read_gguf,
    read_hf,
    window_metadata,
)
from azquant.architectures.experts import MAX_EXPERTS, expert_rules, gguf_experts, hf_experts
from azquant.architectures.fields import gguf_fields, hf_fields
from azquant.architectures.llama import DECODER_SIZES, INV_FREQ, window_warning
from azquant.gguf import MetadataValue, keys
from azquant.program import ProgramSpec

__all__ = ["QWEN2", "QWEN3", "QWEN3MOE", "Qwen2Config", "Qwen3Config", "Qwen3MoeConfig"]


@dataclass(frozen=True)
class Qwen2Config(DecoderConfig):
    """Hyperparameters of a Qwen 2."""

    NAME: ClassVar[str] = "qwen2"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Qwen2Config:
        """From ``config.json``. Raises ConversionError for what is missing, impossible or not to be had."""
        fields = hf_fields(config)
        hf_refuse(fields, cls.NAME, hidden_act=("silu", "swish"))
        if cls.NAME == "qwen3":
            hf_refuse(fields, "qwen3", attention_bias=False)
        common = read_hf(fields, whole_width=cls.NAME == "qwen2")
        layers = common["block_count"]
        window = 0
        if fields.flag("use_sliding_window", default=False):
            window = fields.integer("sliding_window", default=0, low=0)
        first = fields.integer("max_window_layers", default=28, low=0)
        return cls(**common, windows=hf_windows(fields, layers, window, [i >= first for i in range(layers)]))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Qwen2Config:
        """From GGUF metadata as plain values. Raises ModelError for what is missing or impossible."""
        fields = gguf_fields(metadata, cls.NAME)
        common = read_gguf(fields, honoured=("attention.sliding_window",))
        return cls(**common, windows=gguf_windows(fields, common["block_count"]))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What llama.cpp will compute otherwise than this config says."""
        return window_warning(self)

    def own_metadata(self) -> dict[str, MetadataValue]:
        """The sliding window, where there is one."""
        return window_metadata(self.windows) if self.windows else {}


@dataclass(frozen=True)
class Qwen3Config(Qwen2Config):
    """Hyperparameters of a Qwen 3."""

    NAME: ClassVar[str] = "qwen3"


@dataclass(frozen=True)
class Qwen3MoeConfig(Qwen3Config):
    """Hyperparameters of a Qwen 3 with experts."""

    NAME: ClassVar[str] = "qwen3moe"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Qwen3MoeConfig:
        """From ``config.json``. Raises ConversionError for what is missing, impossible or not to be had."""
        fields = hf_fields(config)
        hf_refuse(
            fields,
            cls.NAME,
            hidden_act=("silu", "swish"),
            attention_bias=False,
            decoder_sparse_step=1,
            mlp_only_layers=[],
        )
        if not fields.flag("norm_topk_prob", default=False):
            fields.fail(
                "norm_topk_prob is false, transformers' default, but GGUF's qwen3moe computes only true"
            )
        common = read_hf(fields)
        window = 0
        # In every layer, whatever max_window_layers says.
        if fields.flag("use_sliding_window", default=False):
            silent = 0 if "sliding_window" in config else 4096  # null is none
            window = fields.integer("sliding_window", default=silent, low=0)
        length = fields.integer("moe_intermediate_size", default=768)
        return cls(
            **common,
            windows=(window,) * common["block_count"] if window else (),
            experts=hf_experts(fields, count=128, used=8, length=length),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Qwen3MoeConfig:
        """From GGUF metadata as plain values. Raises ModelError for what is missing or impossible."""
        fields = gguf_fields(metadata, cls.NAME)
        common = read_gguf(fields, honoured=("attention.sliding_window", "expert_count"))
        used = fields.integer("expert_used_count", high=MAX_EXPERTS)
        length = fields.integer("expert_feed_forward_length", default=0, low=0)
        experts = gguf_experts(fields, length or max(1, common["feed_forward_length"] // used), required=True)
        return cls(**common, windows=gguf_windows(fields, common["block_count"]), experts=experts)

    def own_metadata(self) -> dict[str, MetadataValue]:
        """The size of an expert, and the sliding window, where there is one."""
        assert self.experts is not None
        return {"expert_feed_forward_length": keys.u32(self.experts.length), **super().own_metadata()}


def _block(config: Qwen2Config, i: int) -> list[TensorRule]:
    width, inner = config.embedding_length, config.feed_forward_length
    blk, layer = f"blk.{i}", f"layers.{i}"
    biased = config.NAME == "qwen2"
    rules = [
        *norm_rules(f"{blk}.attn_norm", width, f"{layer}.input_layernorm"),
        *linear_rules(f"{blk}.attn_q", (config.query_rows, width), f"{layer}.self_attn.q_proj", bias=biased),
        *linear_rules(f"{blk}.attn_k", (config.kv_rows, width), f"{layer}.self_attn.k_proj", bias=biased),
        *linear_rules(f"{blk}.attn_v", (config.kv_rows, width), f"{layer}.self_attn.v_proj", bias=biased),
        *linear_rules(f"{blk}.attn_output", (width, config.query_rows), f"{layer}.self_attn.o_proj"),
    ]
    if not biased:
        rules += norm_rules(f"{blk}.attn_q_norm", config.head_dim, f"{layer}.self_attn.q_norm")
        rules += norm_rules(f"{blk}.attn_k_norm", config.head_dim, f"{layer}.self_attn.k_norm")
    rules += norm_rules(f"{blk}.ffn_norm", width, f"{layer}.post_attention_layernorm")
    if config.experts is not None:
        names = ("gate_proj", "up_proj", "down_proj")
        return [*rules, *expert_rules(config.experts, width, blk, f"{layer}.mlp", names)]
    return [
        *rules,
        *linear_rules(f"{blk}.ffn_gate", (inner, width), f"{layer}.mlp.gate_proj"),
        *linear_rules(f"{blk}.ffn_up", (inner, width), f"{layer}.mlp.up_proj"),
        *linear_rules(f"{blk}.ffn_down", (width, inner), f"{layer}.mlp.down_proj"),
    ]


def _rules(config: Qwen2Config) -> list[TensorRule]:
    return decoder_rules(config, lambda i: _block(config, i))


def _program(config: Qwen2Config, weights: Weights) -> ProgramSpec[Any]:
    p = DecoderProgram(config, weights)
    p.embed()
    for i in range(config.block_count):
        blk = f"blk.{i}"
        p.norm(p.normed, p.x, f"{blk}.attn_norm")
        p.project(blk, p.normed)
        if config.NAME != "qwen2":
            p.norm_heads(blk)
        p.rope()
        p.attend(i)
        p.linear(p.x, p.attended, f"{blk}.attn_output", residual=p.x)
        p.norm(p.normed, p.x, f"{blk}.ffn_norm")
        p.feed_forward(p.x, p.normed, blk, residual=p.x)
    return p.finish()


QWEN2 = Architecture(
    name="qwen2",
    hf_names=("Qwen2ForCausalLM", "Qwen2Model"),
    config=Qwen2Config,
    rules=_rules,
    program=_program,
    prefixes=("model.", ""),
    hf_sizes=DECODER_SIZES,
    harmless=(INV_FREQ,),
)

QWEN3: Architecture[Any] = Architecture(
    name="qwen3",
    hf_names=("Qwen3ForCausalLM", "Qwen3Model"),
    config=Qwen3Config,
    rules=_rules,
    program=_program,
    prefixes=("model.", ""),
    hf_sizes=DECODER_SIZES,
    harmless=(INV_FREQ,),
)

QWEN3MOE: Architecture[Any] = Architecture(
    name="qwen3moe",
    hf_names=("Qwen3MoeForCausalLM",),
    model_types=("qwen3_moe",),
    config=Qwen3MoeConfig,
    rules=_rules,
    program=_program,
    prefixes=("model.", ""),
    hf_sizes=DECODER_SIZES,
    harmless=(INV_FREQ,),
)
