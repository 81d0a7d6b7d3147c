"""StarCoder 2: LayerNorm, biases everywhere, GELU without a gate, RoPE over halves, grouped queries.

llama.cpp needs every bias; a checkpoint without (``use_bias`` false) gets zeros. Its sliding window is
written and honoured by azquant; llama.cpp has none here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from azquant.architectures.base import Architecture, TensorRule, Weights
from azquant.architectures.blocks import Bias, DecoderProgram, decoder_rules, linear_rules, norm_rules
from azquant.architectures.decoder import (
    LAYER_EPSILON,
    DecoderConfig,
    gguf_windows,
    hf_refuse,
    read_gguf,
    read_hf,
    window_metadata,
)
from azquant.architectures.fields import gguf_fields, hf_fields
from azquant.architectures.gelu import gelu_metadata, gguf_gelu, hf_gelu
from azquant.architectures.llama import DECODER_SIZES, INV_FREQ, window_warning
from azquant.gguf import MetadataValue
from azquant.program import ProgramSpec

__all__ = ["STARCODER2", "Starcoder2Config"]


@dataclass(frozen=True)
class Starcoder2Config(DecoderConfig):
    """Hyperparameters of a StarCoder 2."""

    NAME: ClassVar[str] = "starcoder2"
    EPSILON: ClassVar[str] = LAYER_EPSILON

    biased: bool = True
    """Checkpoint only: whether linears have biases."""
    activation: str = "gelu_tanh"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Starcoder2Config:
        """From ``config.json``. Raises ConversionError for what is missing, impossible or not to be had."""
        fields = hf_fields(config)
        hf_refuse(fields, "starcoder2", norm_type="layer_norm", mlp_type="default")
        common = read_hf(
            fields, epsilon=("norm_epsilon", "layer_norm_epsilon"), default_epsilon=1e-5, whole_width=True
        )
        window = fields.integer("sliding_window", default=0, low=0)
        return cls(
            **common,
            windows=(window,) * common["block_count"] if 0 < window < common["context_length"] else (),
            biased=fields.flag("use_bias", default=True),
            activation=hf_gelu(fields, "hidden_act", "gelu_pytorch_tanh"),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Starcoder2Config:
        """From GGUF metadata as plain values. Raises ModelError for what is missing or impossible."""
        fields = gguf_fields(metadata, "starcoder2")
        common = read_gguf(fields, epsilon=LAYER_EPSILON, honoured=("attention.sliding_window",))
        windows = gguf_windows(fields, common["block_count"])
        return cls(**common, windows=windows, activation=gguf_gelu(fields))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What llama.cpp will compute otherwise than this config says."""
        return window_warning(self)

    def own_metadata(self) -> dict[str, MetadataValue]:
        """The sliding window and the exact GELU, where there are such."""
        return (window_metadata(self.windows) if self.windows else {}) | gelu_metadata(self.activation)


def _block(config: Starcoder2Config, i: int) -> list[TensorRule]:
    width, inner = config.embedding_length, config.feed_forward_length
    blk, layer = f"blk.{i}", f"layers.{i}"
    q, kv = config.query_rows, config.kv_rows
    bias: Bias = True if config.biased else "zeros"
    return [
        *norm_rules(f"{blk}.attn_norm", width, f"{layer}.input_layernorm", bias=True),
        *linear_rules(f"{blk}.attn_q", (q, width), f"{layer}.self_attn.q_proj", bias=bias),
        *linear_rules(f"{blk}.attn_k", (kv, width), f"{layer}.self_attn.k_proj", bias=bias),
        *linear_rules(f"{blk}.attn_v", (kv, width), f"{layer}.self_attn.v_proj", bias=bias),
        *linear_rules(f"{blk}.attn_output", (width, q), f"{layer}.self_attn.o_proj", bias=bias),
        *norm_rules(f"{blk}.ffn_norm", width, f"{layer}.post_attention_layernorm", bias=True),
        *linear_rules(f"{blk}.ffn_up", (inner, width), f"{layer}.mlp.c_fc", bias=bias),
        *linear_rules(f"{blk}.ffn_down", (width, inner), f"{layer}.mlp.c_proj", bias=bias),
    ]


def _rules(config: Starcoder2Config) -> list[TensorRule]:
    last = norm_rules("output_norm", config.embedding_length, "norm", bias=True)
    return decoder_rules(config, lambda i: _block(config, i), norm=last)


def _program(config: Starcoder2Config, weights: Weights) -> ProgramSpec[Any]:
    p = DecoderProgram(config, weights)
    p.embed()
    for i in range(config.block_count):
        blk = f"blk.{i}"
        p.norm(p.normed, p.x, f"{blk}.attn_norm")
        p.project(blk, p.normed)
        p.rope()
        p.attend(i)
        p.linear(p.x, p.attended, f"{blk}.attn_output", residual=p.x)
        p.norm(p.normed, p.x, f"{blk}.ffn_norm")
        p.plain(p.x, p.normed, blk, config.activation, residual=p.x)
    return p.finish()


STARCODER2 = Architecture(
    name="starcoder2",
    hf_names=("Starcoder2ForCausalLM",),
    config=Starcoder2Config,
    rules=_rules,
    program=_program,
    prefixes=("model.", ""),
    hf_sizes=DECODER_SIZES,
    harmless=(INV_FREQ,),
)
