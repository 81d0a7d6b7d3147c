"""Llama 1 to 3.2: RMSNorm, RoPE, grouped queries, SwiGLU; optional biases, tied or separate head.

RoPE scaling: ``linear`` becomes the keys ``llama.rope.scaling.*``, ``llama3`` the tensor
``rope_freqs.weight`` (one divisor per pair of dimensions), as llama.cpp reads them. Other kinds are refused
by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from azquant.architectures.base import (
    Architecture,
    Constant,
    Keep,
    RopeInterleave,
    TensorRule,
    Transform,
    Weights,
)
from azquant.architectures.fields import MAX_BLOCKS, gguf_fields, gguf_vocab_size, hf_fields
from azquant.architectures.rope import Rope, hf_rope
from azquant.gguf import MetadataValue, keys
from azquant.program import ProgramBuilder, ProgramSpec, Ref

__all__ = ["LLAMA", "LlamaConfig"]

# Keys of llama files that change what is computed and that nothing here computes.
_REFUSED_KEYS = (
    "expert_count",
    "attention.scale",
    "attention.sliding_window",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
)


@dataclass(frozen=True)
class LlamaConfig:
    """Hyperparameters of a Llama."""

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
    attention_bias: bool | None = None
    """Whether attention's linears have biases; ``None`` when only the tensors tell."""
    mlp_bias: bool | None = None
    """Whether the feed-forward's linears have biases; ``None`` when only the tensors tell."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """From ``config.json``. Raises ConversionError for what is missing, impossible or not to be had."""
        fields = hf_fields(config)
        activation = fields.text("hidden_act", default="silu")
        if activation not in ("silu", "swish"):
            fields.fail(f"hidden_act is {activation!r}, but GGUF's llama computes silu only")
        width = fields.integer("hidden_size")
        heads = fields.integer("num_attention_heads")
        heads_kv = fields.integer("num_key_value_heads", default=heads)
        fields.divides(heads_kv, "num_key_value_heads", heads, "num_attention_heads")
        if fields.has("head_dim"):
            head_dim = fields.integer("head_dim")
        else:
            head_dim = fields.divides(heads, "num_attention_heads", width, "hidden_size")
        if head_dim % 2:
            fields.fail(f"the head size is {head_dim}, but RoPE turns pairs: it must be even")
        return cls(
            vocab_size=fields.integer("vocab_size"),
            context_length=fields.integer("max_position_embeddings"),
            embedding_length=width,
            feed_forward_length=fields.integer("intermediate_size"),
            block_count=fields.integer("num_hidden_layers", high=MAX_BLOCKS),
            head_count=heads,
            head_count_kv=heads_kv,
            head_dim=head_dim,
            norm_epsilon=fields.number("rms_norm_eps", default=1e-6),
            rope_dimension=head_dim,
            rope=hf_rope(fields, head_dim),
            tied=fields.flag("tie_word_embeddings") if fields.has("tie_word_embeddings") else None,
            attention_bias=fields.flag("attention_bias", default=False),
            mlp_bias=fields.flag("mlp_bias", default=False),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> LlamaConfig:
        """From GGUF metadata as plain values. Raises ModelError for what is missing or impossible."""
        fields = gguf_fields(metadata, "llama")
        for key in _REFUSED_KEYS:
            if fields.has(key) and fields.values[f"llama.{key}"] != 0:
                fields.fail(f"llama.{key} is {fields.values[f'llama.{key}']!r}, which is not supported")
        width = fields.integer("embedding_length")
        heads = fields.integer("attention.head_count")
        heads_kv = fields.integer("attention.head_count_kv", default=heads)
        fields.divides(heads_kv, "attention.head_count_kv", heads, "attention.head_count")
        if fields.has("attention.key_length"):
            head_dim = fields.integer("attention.key_length")
        else:
            head_dim = fields.divides(heads, "attention.head_count", width, "embedding_length")
        if fields.integer("attention.value_length", default=head_dim) != head_dim:
            fields.fail("llama.attention.value_length differs from the key length, which is not supported")
        rope_dimension = fields.integer("rope.dimension_count", default=head_dim)
        if rope_dimension % 2 or rope_dimension > head_dim:
            fields.fail(
                f"llama.rope.dimension_count is {rope_dimension}; it must be even and at most {head_dim}, "
                "the head size"
            )
        # llama.cpp's default is linear; scale_linear is how the first files wrote the factor.
        scaling = fields.text("rope.scaling.type", default="linear")
        if scaling not in ("none", "linear"):
            fields.fail(f"llama.rope.scaling.type is {scaling!r}; known are none and linear")
        scale = fields.number("rope.scaling.factor", "rope.scale_linear", default=1.0)
        return cls(
            vocab_size=gguf_vocab_size(fields),
            context_length=fields.integer("context_length"),
            embedding_length=width,
            feed_forward_length=fields.integer("feed_forward_length"),
            block_count=fields.integer("block_count", high=MAX_BLOCKS),
            head_count=heads,
            head_count_kv=heads_kv,
            head_dim=head_dim,
            norm_epsilon=fields.number("attention.layer_norm_rms_epsilon"),
            rope_dimension=rope_dimension,
            rope=Rope(
                fields.number("rope.freq_base", default=10000.0), scale if scaling == "linear" else 1.0
            ),
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What the conversion changes beyond renaming, for the report."""
        return ("llama3 RoPE scaling: written as rope_freqs.weight",) if self.rope.divisors else ()

    def metadata(self) -> dict[str, MetadataValue]:
        """The ``llama.*`` keys of the GGUF file."""
        found = {
            "llama.vocab_size": keys.u32(self.vocab_size),
            "llama.context_length": keys.u32(self.context_length),
            "llama.embedding_length": keys.u32(self.embedding_length),
            "llama.feed_forward_length": keys.u32(self.feed_forward_length),
            "llama.block_count": keys.u32(self.block_count),
            "llama.attention.head_count": keys.u32(self.head_count),
            "llama.attention.head_count_kv": keys.u32(self.head_count_kv),
            "llama.attention.key_length": keys.u32(self.head_dim),
            "llama.attention.value_length": keys.u32(self.head_dim),
            "llama.attention.layer_norm_rms_epsilon": keys.f32(self.norm_epsilon),
            "llama.rope.dimension_count": keys.u32(self.rope_dimension),
            "llama.rope.freq_base": keys.f32(self.rope.base),
        }
        if self.rope.scale != 1.0:
            found["llama.rope.scaling.type"] = keys.string("linear")
            found["llama.rope.scaling.factor"] = keys.f32(self.rope.scale)
        return found


def _rules(config: LlamaConfig) -> list[TensorRule]:
    width, inner = config.embedding_length, config.feed_forward_length
    q_rows, kv_rows = config.head_count * config.head_dim, config.head_count_kv * config.head_dim
    q, k = RopeInterleave(config.head_count), RopeInterleave(config.head_count_kv)
    keep = Keep()
    divisors = config.rope.divisors
    rules = [
        TensorRule("token_embd.weight", (config.vocab_size, width), "embed_tokens.weight"),
        TensorRule(
            "rope_freqs.weight", (config.rope_dimension // 2,), "", Constant(divisors), optional=not divisors
        ),
    ]
    for i in range(config.block_count):
        block: tuple[tuple[str, tuple[int, ...], str, Transform, bool | None], ...] = (
            ("attn_q", (q_rows, width), "self_attn.q_proj", q, config.attention_bias),
            ("attn_k", (kv_rows, width), "self_attn.k_proj", k, config.attention_bias),
            ("attn_v", (kv_rows, width), "self_attn.v_proj", keep, config.attention_bias),
            ("attn_output", (width, q_rows), "self_attn.o_proj", keep, config.attention_bias),
            ("ffn_norm", (width,), "post_attention_layernorm", keep, False),
            ("ffn_gate", (inner, width), "mlp.gate_proj", keep, config.mlp_bias),
            ("ffn_up", (inner, width), "mlp.up_proj", keep, config.mlp_bias),
            ("ffn_down", (width, inner), "mlp.down_proj", keep, config.mlp_bias),
        )
        rules.append(TensorRule(f"blk.{i}.attn_norm.weight", (width,), f"layers.{i}.input_layernorm.weight"))
        for name, shape, source_name, transform, bias in block:
            target, origin = f"blk.{i}.{name}", f"layers.{i}.{source_name}"
            rules.append(TensorRule(f"{target}.weight", shape, f"{origin}.weight", transform))
            if bias is not False:
                rules.append(
                    TensorRule(
                        f"{target}.bias", shape[:1], f"{origin}.bias", transform, optional=bias is None
                    )
                )
    rules.append(TensorRule("output_norm.weight", (width,), "norm.weight"))
    rules.append(TensorRule("output.weight", (config.vocab_size, width), "lm_head.weight", optional=True))
    return rules


def _frequencies(config: LlamaConfig, divisors: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Radians per position of each rotated pair."""
    pairs = np.arange(0, config.rope_dimension, 2, dtype=np.float64)
    turns = config.rope.base ** (-pairs / config.rope_dimension) / config.rope.scale
    return (turns if divisors is None else turns / divisors).astype(np.float32)


def _program(config: LlamaConfig, weights: Weights) -> ProgramSpec[Any]:
    b: ProgramBuilder[Any] = ProgramBuilder()
    heads, kv_heads, dim = config.head_count, config.head_count_kv, config.head_dim
    width, inner, eps = config.embedding_length, config.feed_forward_length, config.norm_epsilon
    x, normed, qkv = b.buffer(width), b.buffer(width), b.buffer((heads + 2 * kv_heads) * dim)
    attended, gate_up, hidden = b.buffer(heads * dim), b.buffer(2 * inner), b.buffer(inner)
    query, key, value = qkv, qkv.at(heads * dim), qkv.at((heads + kv_heads) * dim)
    frequencies = _frequencies(config, weights.optional_vector("rope_freqs.weight"))

    def linear(out: Ref, a: Ref, name: str, residual: Ref | None = None) -> None:
        bias = weights.optional_vector(f"{name}.bias")
        b.linear(out, a, weights.matrix(f"{name}.weight"), bias, residual=residual)

    b.embed(x, weights.matrix("token_embd.weight"))
    for i in range(config.block_count):
        blk = f"blk.{i}"
        b.rms_norm(normed, x, weights.vector(f"{blk}.attn_norm.weight"), eps)
        linear(query, normed, f"{blk}.attn_q")
        linear(key, normed, f"{blk}.attn_k")
        linear(value, normed, f"{blk}.attn_v")
        b.rope(qkv, heads + kv_heads, dim, frequencies)  # queries and keys, side by side
        b.attention(attended, qkv, i, heads, kv_heads, dim, 1 / math.sqrt(dim))
        linear(x, attended, f"{blk}.attn_output", residual=x)
        b.rms_norm(normed, x, weights.vector(f"{blk}.ffn_norm.weight"), eps)
        linear(gate_up, normed, f"{blk}.ffn_gate")
        linear(gate_up.at(inner), normed, f"{blk}.ffn_up")
        b.glu(hidden, gate_up, gate_up.at(inner), inner, "silu")
        linear(x, hidden, f"{blk}.ffn_down", residual=x)
    chosen, logits = b.buffer(width, outputs=True), b.buffer(config.vocab_size, outputs=True)
    b.select(chosen, x, width)
    b.rms_norm(chosen, chosen, weights.vector("output_norm.weight"), eps)
    b.linear(logits, chosen, weights.head())
    return b.build(n_layer=config.block_count, n_head_kv=kv_heads, head_dim=dim)


LLAMA = Architecture(
    name="llama",
    hf_names=("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"),
    config=LlamaConfig,
    rules=_rules,
    program=_program,
    prefixes=("model.", ""),
    hf_sizes=(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ),
    harmless=(re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),),
)
