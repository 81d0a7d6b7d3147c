"""Falcon 7B, 11B, 40B: one LayerNorm or two for attention and feed-forward side by side, fused QKV in groups.

Falcon-RW (ALiBi, sublayers one after the other) and biases are refused: llama.cpp's falcon has neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from azquant.architectures.base import Architecture, TensorRule, UngroupQKV, Weights
from azquant.architectures.blocks import DecoderProgram, decoder_rules, linear_rules, norm_rules
from azquant.architectures.decoder import LAYER_EPSILON, DecoderConfig, hf_refuse, read_gguf
from azquant.architectures.fields import MAX_BLOCKS, gguf_fields, hf_fields
from azquant.architectures.gelu import gelu_metadata, gguf_gelu, hf_gelu
from azquant.architectures.rope import hf_rope
from azquant.gguf import MetadataValue, keys
from azquant.program import ProgramSpec

__all__ = ["FALCON", "FalconConfig"]


@dataclass(frozen=True)
class FalconConfig(DecoderConfig):
    """Hyperparameters of a Falcon."""

    NAME: ClassVar[str] = "falcon"
    EPSILON: ClassVar[str] = LAYER_EPSILON

    two_norms: bool | None = None
    """Whether attention and feed-forward have a norm each; ``None`` when only the tensors tell."""
    activation: str = "gelu_tanh"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> FalconConfig:
        """From ``config.json``. Raises ConversionError for what is missing, impossible or not to be had."""
        fields = hf_fields(config)
        hf_refuse(fields, "falcon", alibi=False, bias=False)
        grouped = fields.flag("new_decoder_architecture", default=False)
        if not grouped and not fields.flag("parallel_attn", default="parallel_attn" not in config):
            fields.fail("parallel_attn is False, but GGUF's falcon computes only True")
        width = fields.integer("hidden_size")
        heads = fields.integer("num_attention_heads", "n_head")
        head_dim = fields.divides(heads, "num_attention_heads", width, "hidden_size")
        if head_dim % 2:
            fields.fail(f"the head size is {head_dim}, but RoPE turns pairs: it must be even")
        heads_kv = 1
        if grouped or not fields.flag("multi_query", default=True):
            heads_kv = fields.integer("num_kv_heads", "n_head_kv", default=heads)
        fields.divides(heads_kv, "num_kv_heads", heads, "num_attention_heads")
        if not grouped and heads_kv not in (1, heads):
            fields.fail(
                f"num_kv_heads is {heads_kv}, but without new_decoder_architecture it must be {heads}"
            )
        return cls(
            vocab_size=fields.integer("vocab_size"),
            context_length=fields.integer("max_position_embeddings", default=2048),
            embedding_length=width,
            feed_forward_length=fields.integer("ffn_hidden_size", default=4 * width),
            block_count=fields.integer("num_hidden_layers", "n_layer", high=MAX_BLOCKS),
            head_count=heads,
            head_count_kv=heads_kv,
            head_dim=head_dim,
            norm_epsilon=fields.number("layer_norm_epsilon", default=1e-5),
            rope_dimension=head_dim,
            rope=hf_rope(fields, head_dim),
            tied=fields.flag("tie_word_embeddings", default=True),
            two_norms=grouped and fields.integer("num_ln_in_parallel_attn", default=2, high=2) == 2,
            activation=hf_gelu(fields, "activation", "gelu"),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> FalconConfig:
        """From GGUF metadata as plain values. Raises ModelError for what is missing or impossible."""
        fields = gguf_fields(metadata, "falcon")
        return cls(**read_gguf(fields, epsilon=LAYER_EPSILON), activation=gguf_gelu(fields))

    def own_metadata(self) -> dict[str, MetadataValue]:
        """The layout of the fused QKV, as llama.cpp's converter calls it, and the exact GELU."""
        return {"tensor_data_layout": keys.string("jploski")} | gelu_metadata(self.activation)


def _block(config: FalconConfig, i: int) -> list[TensorRule]:
    width, inner = config.embedding_length, config.feed_forward_length
    blk, layer = f"blk.{i}", f"h.{i}"
    qkv = UngroupQKV(config.head_count_kv, config.head_count // config.head_count_kv, config.head_dim)
    rows, source = config.query_rows + 2 * config.kv_rows, f"{layer}.self_attention"
    mlp_norm = f"{layer}.{'ln_mlp' if config.two_norms else 'input_layernorm'}"
    rules = norm_rules(f"{blk}.attn_norm", width, mlp_norm, bias=True)
    if config.two_norms is not False:
        optional = config.two_norms is None
        rules += [
            TensorRule(f"{blk}.attn_norm_2.{kind}", (width,), f"{layer}.ln_attn.{kind}", optional=optional)
            for kind in ("weight", "bias")
        ]
    return [
        *rules,
        *linear_rules(f"{blk}.attn_qkv", (rows, width), f"{source}.query_key_value", qkv),
        *linear_rules(f"{blk}.attn_output", (width, width), f"{source}.dense"),
        *linear_rules(f"{blk}.ffn_up", (inner, width), f"{layer}.mlp.dense_h_to_4h"),
        *linear_rules(f"{blk}.ffn_down", (width, inner), f"{layer}.mlp.dense_4h_to_h"),
    ]


def _rules(config: FalconConfig) -> list[TensorRule]:
    last = norm_rules("output_norm", config.embedding_length, "ln_f", bias=True)
    return decoder_rules(config, lambda i: _block(config, i), embedding="word_embeddings", norm=last)


def _program(config: FalconConfig, weights: Weights) -> ProgramSpec[Any]:
    p = DecoderProgram(config, weights)
    to_attend = p.b.buffer(config.embedding_length)
    p.embed()
    for i in range(config.block_count):
        blk = f"blk.{i}"
        p.norm(p.normed, p.x, f"{blk}.attn_norm")
        source = p.normed
        if weights.optional_vector(f"{blk}.attn_norm_2.weight") is not None:
            source = to_attend
            p.norm(source, p.x, f"{blk}.attn_norm_2")
        p.linear(p.query, source, f"{blk}.attn_qkv")
        p.rope()
        p.attend(i)
        p.linear(p.x, p.attended, f"{blk}.attn_output", residual=p.x)
        p.plain(p.x, p.normed, blk, config.activation, residual=p.x)
    return p.finish()


FALCON = Architecture(
    name="falcon",
    hf_names=("FalconForCausalLM", "RWForCausalLM"),
    model_types=("RefinedWeb", "RefinedWebModel"),
    config=FalconConfig,
    rules=_rules,
    program=_program,
    prefixes=("transformer.", ""),
    hf_sizes=("vocab_size", "hidden_size", "ffn_hidden_size", "num_hidden_layers", "num_attention_heads"),
)
