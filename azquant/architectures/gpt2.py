"""GPT-2: learned positions, LayerNorm, fused QKV, tanh GELU. What OpenAI and ``transformers`` call gpt2.

llama.cpp's gpt2 graph is fixed: it needs every bias, scales scores by 1/sqrt(head size) and applies tanh
GELU. A config that asks for other score scales is honoured by folding the difference into the query rows of
the fused QKV; any other departure is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from azquant.architectures.base import (
    Architecture,
    Keep,
    ScaleRows,
    TensorRule,
    Transform,
    Transpose,
    Weights,
)
from azquant.architectures.fields import MAX_BLOCKS, gguf_fields, gguf_vocab_size, hf_fields
from azquant.gguf import MetadataValue, keys
from azquant.program import ProgramBuilder, ProgramSpec, Ref

__all__ = ["GPT2", "GPT2Config"]

# transformers' names of one function: 0.5·x·(1 + tanh(sqrt(2/pi)·(x + 0.044715·x³))).
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh", "gelu_accurate")


@dataclass(frozen=True)
class GPT2Config:
    """Hyperparameters of a GPT-2."""

    vocab_size: int
    context_length: int
    embedding_length: int
    feed_forward_length: int
    block_count: int
    head_count: int
    norm_epsilon: float
    tied: bool | None = None
    """Whether the embedding is also the output head; ``None`` when only the tensors tell."""
    scale_by_head: bool = True
    """Checkpoint only: scores are divided by sqrt(head size)."""
    scale_by_layer: bool = False
    """Checkpoint only: scores of layer i are divided by i + 1."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> GPT2Config:
        """From ``config.json``. Raises ConversionError for what is missing, impossible or not to be had."""
        fields = hf_fields(config)
        activation = fields.text("activation_function", default="gelu_new")
        if activation not in _TANH_GELU:
            fields.fail(
                f"activation_function is {activation!r}, but GGUF's gpt2 computes tanh GELU only "
                f"({', '.join(_TANH_GELU)})"
            )
        if fields.flag("add_cross_attention", default=False):
            fields.fail("add_cross_attention is true, but GGUF's gpt2 has no cross-attention")
        width = fields.integer("n_embd", "hidden_size")
        heads = fields.integer("n_head", "num_attention_heads")
        fields.divides(heads, "n_head", width, "n_embd")
        return cls(
            vocab_size=fields.integer("vocab_size"),
            context_length=fields.integer("n_positions", "max_position_embeddings", "n_ctx"),
            embedding_length=width,
            feed_forward_length=fields.integer("n_inner", default=4 * width),
            block_count=fields.integer("n_layer", "num_hidden_layers", high=MAX_BLOCKS),
            head_count=heads,
            norm_epsilon=fields.number("layer_norm_epsilon", default=1e-5),
            tied=fields.flag("tie_word_embeddings", default=True),
            scale_by_head=fields.flag("scale_attn_weights", default=True),
            scale_by_layer=fields.flag("scale_attn_by_inverse_layer_idx", default=False),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> GPT2Config:
        """From GGUF metadata as plain values. Raises ModelError for what is missing or impossible."""
        fields = gguf_fields(metadata, "gpt2")
        width = fields.integer("embedding_length")
        heads = fields.integer("attention.head_count")
        fields.divides(heads, "attention.head_count", width, "embedding_length")
        if fields.integer("attention.head_count_kv", default=heads) != heads:
            fields.fail("gpt2.attention.head_count_kv differs from head_count; gpt2 has no grouped queries")
        return cls(
            vocab_size=gguf_vocab_size(fields),
            context_length=fields.integer("context_length"),
            embedding_length=width,
            feed_forward_length=fields.integer("feed_forward_length"),
            block_count=fields.integer("block_count", high=MAX_BLOCKS),
            head_count=heads,
            norm_epsilon=fields.number("attention.layer_norm_epsilon"),
        )

    @property
    def head_dim(self) -> int:
        """Elements per attention head."""
        return self.embedding_length // self.head_count

    @property
    def notes(self) -> tuple[str, ...]:
        """What the conversion changes beyond renaming, for the report."""
        notes = []
        if not self.scale_by_head:
            notes.append("scale_attn_weights=false: query weights multiplied by sqrt(head size)")
        if self.scale_by_layer:
            notes.append("scale_attn_by_inverse_layer_idx: query weights of layer i divided by i + 1")
        return tuple(notes)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What llama.cpp will compute otherwise than this config says: nothing."""
        return ()

    def query_factor(self, layer: int) -> float:
        """What the query rows of ``layer`` are multiplied by, so that 1/sqrt(head size) is the scale left."""
        factor = 1.0 if self.scale_by_head else math.sqrt(self.head_dim)
        return factor / (layer + 1) if self.scale_by_layer else factor

    def metadata(self) -> dict[str, MetadataValue]:
        """The ``gpt2.*`` keys of the GGUF file."""
        return {
            "gpt2.vocab_size": keys.u32(self.vocab_size),
            "gpt2.context_length": keys.u32(self.context_length),
            "gpt2.embedding_length": keys.u32(self.embedding_length),
            "gpt2.feed_forward_length": keys.u32(self.feed_forward_length),
            "gpt2.block_count": keys.u32(self.block_count),
            "gpt2.attention.head_count": keys.u32(self.head_count),
            "gpt2.attention.layer_norm_epsilon": keys.f32(self.norm_epsilon),
        }


def _rules(config: GPT2Config) -> list[TensorRule]:
    width, inner = config.embedding_length, config.feed_forward_length
    rules = [
        TensorRule("token_embd.weight", (config.vocab_size, width), "wte.weight"),
        TensorRule("position_embd.weight", (config.context_length, width), "wpe.weight"),
    ]
    for i in range(config.block_count):
        factor = config.query_factor(i)

        def query(inner: Transform, factor: float = factor) -> Transform:
            return inner if factor == 1.0 else ScaleRows(inner, width, factor)

        rules += [
            *_both(f"blk.{i}.attn_norm", (width,), f"h.{i}.ln_1"),
            TensorRule(
                f"blk.{i}.attn_qkv.weight",
                (3 * width, width),
                f"h.{i}.attn.c_attn.weight",
                query(Transpose()),
            ),
            TensorRule(f"blk.{i}.attn_qkv.bias", (3 * width,), f"h.{i}.attn.c_attn.bias", query(Keep())),
            *_both(f"blk.{i}.attn_output", (width, width), f"h.{i}.attn.c_proj"),
            *_both(f"blk.{i}.ffn_norm", (width,), f"h.{i}.ln_2"),
            *_both(f"blk.{i}.ffn_up", (inner, width), f"h.{i}.mlp.c_fc"),
            *_both(f"blk.{i}.ffn_down", (width, inner), f"h.{i}.mlp.c_proj"),
        ]
    rules += _both("output_norm", (width,), "ln_f")
    rules.append(TensorRule("output.weight", (config.vocab_size, width), "lm_head.weight", optional=True))
    return rules


def _both(name: str, shape: tuple[int, ...], source: str) -> list[TensorRule]:
    """Weight and bias of a norm (1-D) or of a Conv1D, which stores its matrix as (in, out)."""
    transform: Transform = Transpose() if len(shape) == 2 else Keep()
    return [
        TensorRule(f"{name}.weight", shape, f"{source}.weight", transform),
        TensorRule(f"{name}.bias", shape[:1], f"{source}.bias"),
    ]


def _program(config: GPT2Config, weights: Weights) -> ProgramSpec[Any]:
    b: ProgramBuilder[Any] = ProgramBuilder()
    width, heads, dim, eps = config.embedding_length, config.head_count, config.head_dim, config.norm_epsilon
    x, normed, qkv = b.buffer(width), b.buffer(width), b.buffer(3 * width)
    attended, hidden = b.buffer(width), b.buffer(config.feed_forward_length)
    matrix, vector = weights.matrix, weights.vector

    def norm(out: Ref, a: Ref, name: str) -> None:
        b.layer_norm(out, a, vector(f"{name}.weight"), vector(f"{name}.bias"), eps)

    b.embed(x, matrix("token_embd.weight"), matrix("position_embd.weight"))
    for i in range(config.block_count):
        blk = f"blk.{i}"
        norm(normed, x, f"{blk}.attn_norm")
        b.linear(qkv, normed, matrix(f"{blk}.attn_qkv.weight"), vector(f"{blk}.attn_qkv.bias"))
        b.attention(attended, qkv, i, heads, heads, dim, 1 / math.sqrt(dim))
        output = matrix(f"{blk}.attn_output.weight"), vector(f"{blk}.attn_output.bias")
        b.linear(x, attended, *output, residual=x)
        norm(normed, x, f"{blk}.ffn_norm")
        up = matrix(f"{blk}.ffn_up.weight"), vector(f"{blk}.ffn_up.bias")
        b.linear(hidden, normed, *up, activation="gelu_tanh")
        b.linear(x, hidden, matrix(f"{blk}.ffn_down.weight"), vector(f"{blk}.ffn_down.bias"), residual=x)
    chosen, logits = b.buffer(width, outputs=True), b.buffer(config.vocab_size, outputs=True)
    b.select(chosen, x, width)
    norm(chosen, chosen, "output_norm")
    b.linear(logits, chosen, weights.head())
    return b.build(n_layer=config.block_count, n_head_kv=heads, head_dim=dim)


GPT2 = Architecture(
    name="gpt2",
    hf_names=("GPT2LMHeadModel", "GPT2Model"),
    config=GPT2Config,
    rules=_rules,
    program=_program,
    prefixes=("transformer.", ""),
    hf_sizes=("vocab_size", "n_positions", "n_embd", "n_inner", "n_layer", "n_head"),
    harmless=(re.compile(r"h\.\d+\.attn\.(bias|masked_bias)"),),  # the causal mask
)
