"""GPT-NeoX and Pythia: LayerNorm, fused QKV in groups of one head, RoPE over part of each head, GELU.

With ``use_parallel_residual`` (the rule) attention and feed-forward both read the layer's input. llama.cpp
needs every bias and a head of its own: zeros and a second copy of the embedding stand in where a checkpoint
has none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from azquant.architectures.base import Architecture, TensorRule, UngroupQKV, Weights
from azquant.architectures.blocks import Bias, DecoderProgram, decoder_rules, linear_rules, norm_rules
from azquant.architectures.decoder import LAYER_EPSILON, DecoderConfig, read_gguf, read_hf
from azquant.architectures.fields import gguf_fields, hf_fields
from azquant.architectures.gelu import gelu_metadata, gguf_gelu, hf_gelu
from azquant.architectures.llama import DECODER_SIZES
from azquant.gguf import MetadataValue, keys
from azquant.program import ProgramSpec

__all__ = ["GPTNEOX", "GPTNeoXConfig"]


@dataclass(frozen=True)
class GPTNeoXConfig(DecoderConfig):
    """Hyperparameters of a GPT-NeoX."""

    NAME: ClassVar[str] = "gptneox"
    EPSILON: ClassVar[str] = LAYER_EPSILON

    parallel: bool = True
    """Whether attention and feed-forward read the same input."""
    attention_bias: bool = True
    """Checkpoint only: whether attention's linears have biases."""
    activation: str = "gelu_tanh"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> GPTNeoXConfig:
        """From ``config.json``. Raises ConversionError for what is missing, impossible or not to be had."""
        fields = hf_fields(config)
        common = read_hf(
            fields,
            epsilon=("layer_norm_eps",),
            default_epsilon=1e-5,
            whole_width=True,
            partial_rope=0.25,
            rope_keys=("rotary_emb_base", "rotary_pct"),
        )
        common["head_count_kv"] = common["head_count"]  # transformers has no grouped queries here
        return cls(
            **common,
            parallel=fields.flag("use_parallel_residual", default=True),
            attention_bias=fields.flag("attention_bias", default=True),
            activation=hf_gelu(fields, "hidden_act", "gelu"),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> GPTNeoXConfig:
        """From GGUF metadata as plain values. Raises ModelError for what is missing or impossible."""
        fields = gguf_fields(metadata, "gptneox")
        common = read_gguf(fields, epsilon=LAYER_EPSILON)
        if common["head_count_kv"] != common["head_count"]:
            fields.fail(
                "gptneox.attention.head_count_kv differs from head_count; gptneox has no grouped queries"
            )
        return cls(
            **common,
            parallel=fields.flag("use_parallel_residual", default=True),
            activation=gguf_gelu(fields),
        )

    def own_metadata(self) -> dict[str, MetadataValue]:
        """How the sublayers are joined, and the exact GELU."""
        return {"use_parallel_residual": keys.boolean(self.parallel)} | gelu_metadata(self.activation)


def _block(config: GPTNeoXConfig, i: int) -> list[TensorRule]:
    width, inner = config.embedding_length, config.feed_forward_length
    blk, layer = f"blk.{i}", f"layers.{i}"
    bias: Bias = True if config.attention_bias else "zeros"
    qkv = UngroupQKV(config.head_count, 1, config.head_dim)
    source = f"{layer}.attention"
    return [
        *norm_rules(f"{blk}.attn_norm", width, f"{layer}.input_layernorm", bias=True),
        *linear_rules(f"{blk}.attn_qkv", (3 * width, width), f"{source}.query_key_value", qkv, bias=bias),
        *linear_rules(f"{blk}.attn_output", (width, width), f"{source}.dense", bias=bias),
        *norm_rules(f"{blk}.ffn_norm", width, f"{layer}.post_attention_layernorm", bias=True),
        *linear_rules(f"{blk}.ffn_up", (inner, width), f"{layer}.mlp.dense_h_to_4h", bias=True),
        *linear_rules(f"{blk}.ffn_down", (width, inner), f"{layer}.mlp.dense_4h_to_h", bias=True),
    ]


def _rules(config: GPTNeoXConfig) -> list[TensorRule]:
    last = norm_rules("output_norm", config.embedding_length, "final_layer_norm", bias=True)
    return decoder_rules(
        config, lambda i: _block(config, i), embedding="embed_in", norm=last, head="embed_out"
    )


def _program(config: GPTNeoXConfig, weights: Weights) -> ProgramSpec[Any]:
    p = DecoderProgram(config, weights)
    between = p.b.buffer(config.embedding_length)  # the input with attention's share
    p.embed()
    for i in range(config.block_count):
        blk = f"blk.{i}"
        p.norm(p.normed, p.x, f"{blk}.attn_norm")
        p.linear(p.query, p.normed, f"{blk}.attn_qkv")
        p.rope()
        p.attend(i)
        p.linear(between, p.attended, f"{blk}.attn_output", residual=p.x)
        p.norm(p.normed, p.x if config.parallel else between, f"{blk}.ffn_norm")
        p.plain(p.x, p.normed, blk, config.activation, residual=between)
    return p.finish()


GPTNEOX = Architecture(
    name="gptneox",
    hf_names=("GPTNeoXForCausalLM",),
    model_types=("gpt_neox",),
    config=GPTNeoXConfig,
    rules=_rules,
    program=_program,
    prefixes=("gpt_neox.", ""),
    hf_sizes=DECODER_SIZES,
    harmless=(
        re.compile(r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"),
        re.compile(r"rotary_emb\.inv_freq"),
    ),
    head="required",
)
