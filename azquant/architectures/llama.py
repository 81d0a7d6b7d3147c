"""Llama 1 to 3.2, Mistral, Ministral, Mixtral: RMSNorm, RoPE, grouped queries, SwiGLU; optional biases.

RoPE scaling: ``linear`` becomes the keys ``llama.rope.scaling.*``, ``llama3`` the tensor
``rope_freqs.weight`` (one divisor per pair of dimensions), as llama.cpp reads them. Other kinds are refused
by name. Mistral and Mixtral are Llamas to llama.cpp, which knows no sliding window there; azquant writes the
window and honours it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from azquant.architectures.base import Architecture, Constant, RopeInterleave, TensorRule, Weights
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
from azquant.architectures.experts import EXPERT_SIZES, expert_rules, gguf_experts, hf_experts
from azquant.architectures.fields import gguf_fields, hf_fields
from azquant.gguf import MetadataValue
from azquant.program import ProgramSpec

__all__ = ["DECODER_SIZES", "INV_FREQ", "LLAMA", "LlamaConfig", "llama_block"]

DECODER_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    *EXPERT_SIZES,
)
"""Keys of config.json that decide shapes."""

INV_FREQ = re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Buffers of old checkpoints."""


def _is(config: Mapping[str, Any], *model_types: str) -> bool:
    named = config.get("architectures")
    classes = [f"{name.capitalize()}ForCausalLM" for name in model_types]
    return config.get("model_type") in model_types or (
        isinstance(named, list) and any(name in named for name in classes)
    )


@dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """Hyperparameters of a Llama."""

    NAME: ClassVar[str] = "llama"

    attention_bias: bool | None = None
    """Whether attention's linears have biases; ``None`` when only the tensors tell."""
    mlp_bias: bool | None = None
    """Whether the feed-forward's linears have biases; ``None`` when only the tensors tell."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """From ``config.json``. Raises ConversionError for what is missing, impossible or not to be had."""
        fields = hf_fields(config)
        hf_refuse(fields, "llama", hidden_act=("silu", "swish"))
        common = read_hf(fields, kinds=("default", "linear", "llama3"))
        layers = common["block_count"]
        windows: tuple[int, ...] = ()
        mixtral = _is(config, "mixtral")
        if mixtral or _is(config, "mistral", "ministral"):  # LlamaForCausalLM ignores these keys
            # null is none, silence transformers' default
            silent = 0 if mixtral or "sliding_window" in config else 4096
            window = fields.integer("sliding_window", default=silent, low=0)
            windows = hf_windows(fields, layers, window, [True] * layers)
        return cls(
            **common,
            windows=windows if max(windows, default=0) < common["context_length"] else (),
            attention_bias=not mixtral and fields.flag("attention_bias", default=False),
            mlp_bias=not mixtral and fields.flag("mlp_bias", default=False),
            experts=hf_experts(fields, count=8, used=2, length=common["feed_forward_length"])
            if mixtral
            else None,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> LlamaConfig:
        """From GGUF metadata as plain values. Raises ModelError for what is missing or impossible."""
        fields = gguf_fields(metadata, "llama")
        common = read_gguf(fields, honoured=("attention.sliding_window", "expert_count"))
        return cls(
            **common,
            windows=gguf_windows(fields, common["block_count"]),
            experts=gguf_experts(fields, common["feed_forward_length"]),
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What the conversion changes beyond renaming, for the report."""
        return ("llama3 RoPE scaling: written as rope_freqs.weight",) if self.rope.divisors else ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What llama.cpp will compute otherwise than this config says."""
        return window_warning(self)

    def own_metadata(self) -> dict[str, MetadataValue]:
        """The sliding window, where there is one."""
        return window_metadata(self.windows) if self.windows else {}


def window_warning(config: DecoderConfig) -> tuple[str, ...]:
    """For architectures whose window llama.cpp takes no account of."""
    if not config.windows:
        return ()
    return (
        f"sliding_window is {max(config.windows)}: azquant honours it, but llama.cpp's {config.NAME} lets "
        f"every token see all before it, so beyond {max(config.windows)} tokens their answers differ",
    )


def llama_block(config: LlamaConfig, i: int) -> list[TensorRule]:
    """The tensors of layer ``i``, with query and key rows as llama.cpp's neighbouring pairs want them."""
    width, inner = config.embedding_length, config.feed_forward_length
    blk, layer = f"blk.{i}", f"layers.{i}"
    attention, mlp = config.attention_bias, config.mlp_bias
    q, k = RopeInterleave(config.head_count), RopeInterleave(config.head_count_kv)
    if config.experts is None:
        feed_forward = [
            *linear_rules(f"{blk}.ffn_gate", (inner, width), f"{layer}.mlp.gate_proj", bias=mlp),
            *linear_rules(f"{blk}.ffn_up", (inner, width), f"{layer}.mlp.up_proj", bias=mlp),
            *linear_rules(f"{blk}.ffn_down", (width, inner), f"{layer}.mlp.down_proj", bias=mlp),
        ]
    else:
        feed_forward = expert_rules(
            config.experts, width, blk, f"{layer}.block_sparse_moe", ("w1", "w3", "w2")
        )
    return [
        *norm_rules(f"{blk}.attn_norm", width, f"{layer}.input_layernorm"),
        *linear_rules(
            f"{blk}.attn_q", (config.query_rows, width), f"{layer}.self_attn.q_proj", q, bias=attention
        ),
        *linear_rules(
            f"{blk}.attn_k", (config.kv_rows, width), f"{layer}.self_attn.k_proj", k, bias=attention
        ),
        *linear_rules(f"{blk}.attn_v", (config.kv_rows, width), f"{layer}.self_attn.v_proj", bias=attention),
        *linear_rules(
            f"{blk}.attn_output", (width, config.query_rows), f"{layer}.self_attn.o_proj", bias=attention
        ),
        *norm_rules(f"{blk}.ffn_norm", width, f"{layer}.post_attention_layernorm"),
        *feed_forward,
    ]


def _rules(config: LlamaConfig) -> list[TensorRule]:
    divisors = config.rope.divisors
    turns = TensorRule(
        "rope_freqs.weight", (config.rope_dimension // 2,), "", Constant(divisors), optional=not divisors
    )
    return decoder_rules(config, lambda i: llama_block(config, i), before=(turns,))


def _program(config: LlamaConfig, weights: Weights) -> ProgramSpec[Any]:
    p = DecoderProgram(config, weights, neox=False)
    p.embed()
    for i in range(config.block_count):
        blk = f"blk.{i}"
        p.norm(p.normed, p.x, f"{blk}.attn_norm")
        p.project(blk, p.normed)
        p.rope()
        p.attend(i)
        p.linear(p.x, p.attended, f"{blk}.attn_output", residual=p.x)
        p.norm(p.normed, p.x, f"{blk}.ffn_norm")
        p.feed_forward(p.x, p.normed, blk, residual=p.x)
    return p.finish()


LLAMA = Architecture(
    name="llama",
    hf_names=(
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "MinistralForCausalLM",
        "MixtralForCausalLM",
        "LLaMAForCausalLM",
        "LlamaModel",
    ),
    model_types=("mistral", "ministral", "mixtral"),
    config=LlamaConfig,
    rules=_rules,
    program=_program,
    prefixes=("model.", ""),
    hf_sizes=DECODER_SIZES,
    harmless=(INV_FREQ,),
)
