"""GPT-2: learned positions, LayerNorm, fused QKV, GELU. What OpenAI and ``transformers`` call gpt2.

llama.cpp's gpt2 graph is fixed: it needs every bias, scales scores by 1/sqrt(head size) and applies tanh
GELU. A config that asks for other score scales is honoured by folding the difference into the query rows of
the fused QKV. Exact GELU, ReLU and a bias of the output head are said in keys that llama.cpp skips; azquant
heeds them. Any other departure is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from azquant._lazy import np
from azquant.architectures.base import (
    Architecture,
    Keep,
    ScaleRows,
    TensorRule,
    Transform,
    Transpose,
    Weights,
)
from azquant.architectures.fields import MAX_BLOCKS, Fields, gguf_fields, gguf_vocab_size, hf_fields
from azquant.gguf import MetadataValue, ValueType, keys
from azquant.program import ProgramBuilder, ProgramSpec, Ref

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ACTIVATION_KEY", "GPT2", "OUTPUT_BIAS_KEY", "RELU_SCALE", "GPT2Config"]

ACTIVATION_KEY = "gpt2.hidden_activation"
"""Written where it is not tanh GELU, under transformers' name. llama.cpp does not read it for gpt2."""
OUTPUT_BIAS_KEY = "azquant.output.bias"
"""The output head's bias, one float a token. As a tensor it would keep llama.cpp from loading the file."""
RELU_SCALE = 64.0
"""A ReLU model's feed-forward input is multiplied by this and its output divided. ReLU does not notice, since
relu(c·x)/c = relu(x) exactly for a power of two, and llama.cpp's GELU comes within 0.17/c of a ReLU."""

_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh", "gelu_erf": "gelu", "relu": "relu"}
"""An op's activation, and what transformers calls it."""

# transformers' names of one function: 0.5·x·(1 + tanh(sqrt(2/pi)·(x + 0.044715·x³))).
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh", "gelu_accurate")
_OPS = {
    **dict.fromkeys(_TANH_GELU, "gelu_tanh"),
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
    "relu": "relu",
}
"""The op of each ``activation_function`` that can be had."""


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
    activation: str = "gelu_tanh"
    """Of the feed-forward: ``"gelu_tanh"``, which llama.cpp computes, ``"gelu_erf"`` or ``"relu"``."""
    output_bias: NDArray[np.float32] | None = field(default=None, repr=False, compare=False)
    """Added to the logits, (vocab_size,)."""
    scale_by_width: bool = False
    """Checkpoint only: scores are divided by sqrt(embedding length), not by sqrt(head size)."""
    scale_by_head: bool = True
    """Checkpoint only: scores are divided by sqrt(head size)."""
    scale_by_layer: bool = False
    """Checkpoint only: scores of layer i are divided by i + 1."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> GPT2Config:
        """From ``config.json``. Raises ConversionError for what is missing, impossible or not to be had."""
        fields = hf_fields(config)
        activation = fields.text("activation_function", default="gelu_new")
        if activation not in _OPS:
            fields.fail(
                f"activation_function is {activation!r}, but GGUF's gpt2 computes GELU, and ReLU through it "
                f"({', '.join(_OPS)})"
            )
        if fields.flag("add_cross_attention", default=False):
            fields.fail("add_cross_attention is true, but GGUF's gpt2 has no cross-attention")
        width = fields.integer("n_embd", "hidden_size")
        heads = fields.integer("n_head", "num_attention_heads")
        fields.divides(heads, "n_head", width, "n_embd")
        if (
            fields.integer("num_attention_heads", default=heads) != heads
        ):  # transformers takes the last it reads
            fields.fail(f"n_head is {heads}, but num_attention_heads {config['num_attention_heads']}")
        return cls(
            vocab_size=fields.integer("vocab_size"),
            context_length=fields.integer("n_positions", "max_position_embeddings", "n_ctx"),
            embedding_length=width,
            feed_forward_length=fields.integer("n_inner", default=4 * width),
            block_count=fields.integer("n_layer", "num_hidden_layers", high=MAX_BLOCKS),
            head_count=heads,
            norm_epsilon=fields.number("layer_norm_epsilon", default=1e-5),
            tied=fields.flag("tie_word_embeddings", default=True),
            activation=_OPS[activation],
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
        vocab_size = gguf_vocab_size(fields)
        return cls(
            vocab_size=vocab_size,
            context_length=fields.integer("context_length"),
            embedding_length=width,
            feed_forward_length=fields.integer("feed_forward_length"),
            block_count=fields.integer("block_count", high=MAX_BLOCKS),
            head_count=heads,
            norm_epsilon=fields.number("attention.layer_norm_epsilon"),
            activation=_gguf_activation(fields),
            output_bias=_gguf_output_bias(fields, vocab_size),
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
        if self.scale_by_width:
            notes.append("scores divided by sqrt(n_embd): query weights divided by sqrt(n_head)")
        if self.activation == "relu":
            notes.append(
                f"ReLU: feed-forward inputs times {RELU_SCALE:g}, outputs divided by it; azquant computes "
                f"the same, llama.cpp within {0.17 / RELU_SCALE:.4f} of each activation"
            )
        return tuple(notes)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What llama.cpp will compute otherwise than this config says."""
        said = []
        if self.activation == "gelu_erf":
            said.append(
                "the model computes GELU exactly, llama.cpp's gpt2 approximates it by tanh (within 0.0005 of "
                f"each activation); {ACTIVATION_KEY} tells azquant, which computes it exactly"
            )
        if self.output_bias is not None:
            said.append(
                "the output head has a bias, which llama.cpp's gpt2 does not know and leaves out; azquant "
                f"adds it ({OUTPUT_BIAS_KEY}). A head trained as nn.Linear(..., bias=False) loses nothing"
            )
        return tuple(said)

    def query_factor(self, layer: int) -> float:
        """What the query rows of ``layer`` are multiplied by, so that 1/sqrt(head size) is the scale left."""
        factor = 1.0 if self.scale_by_head else math.sqrt(self.head_dim)
        if self.scale_by_width:
            factor /= math.sqrt(self.head_count)
        return factor / (layer + 1) if self.scale_by_layer else factor

    def metadata(self) -> dict[str, MetadataValue]:
        """The ``gpt2.*`` keys of the GGUF file."""
        metadata = {
            "gpt2.vocab_size": keys.u32(self.vocab_size),
            "gpt2.context_length": keys.u32(self.context_length),
            "gpt2.embedding_length": keys.u32(self.embedding_length),
            "gpt2.feed_forward_length": keys.u32(self.feed_forward_length),
            "gpt2.block_count": keys.u32(self.block_count),
            "gpt2.attention.head_count": keys.u32(self.head_count),
            "gpt2.attention.layer_norm_epsilon": keys.f32(self.norm_epsilon),
        }
        if self.activation != "gelu_tanh":
            metadata[ACTIVATION_KEY] = keys.string(_ACTIVATIONS[self.activation])
        if self.output_bias is not None:
            metadata[OUTPUT_BIAS_KEY] = keys.array(ValueType.FLOAT32, self.output_bias)
        return metadata


def _gguf_activation(fields: Fields) -> str:
    name = fields.text("hidden_activation", default="gelu_pytorch_tanh")
    known = {theirs: ours for ours, theirs in _ACTIVATIONS.items()}
    if name not in known:
        fields.fail(f"{ACTIVATION_KEY} is {name!r:.60}; known are {', '.join(known)}")
    return known[name]


def _gguf_output_bias(fields: Fields, vocab_size: int) -> NDArray[np.float32] | None:
    value = fields.values.get(OUTPUT_BIAS_KEY)
    if value is None:
        return None
    try:
        bias = np.asarray(value.tolist() if hasattr(value, "tolist") else value, dtype=np.float32)
    except (TypeError, ValueError):
        fields.fail(f"{OUTPUT_BIAS_KEY} is no array of numbers")
    if bias.shape != (vocab_size,):
        fields.fail(f"{OUTPUT_BIAS_KEY} has shape {bias.shape}, the model {vocab_size} tokens")
    if not np.isfinite(bias).all():
        fields.fail(f"{OUTPUT_BIAS_KEY} holds NaN or infinity")
    return bias


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
        if config.activation == "relu":
            rules[-4:-1] = [scaled_for_relu(rule) for rule in rules[-4:-1]]
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


def scaled_for_relu(rule: TensorRule) -> TensorRule:
    """The rule of a feed-forward weight or bias, made for :data:`RELU_SCALE`; not for the output's bias."""
    factor = RELU_SCALE if ".ffn_up." in rule.name else 1 / RELU_SCALE
    return replace(rule, transform=ScaleRows(rule.transform, rule.shape[0], factor))


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
        b.linear(hidden, normed, *up, activation=config.activation)
        b.linear(x, hidden, matrix(f"{blk}.ffn_down.weight"), vector(f"{blk}.ffn_down.bias"), residual=x)
    chosen, logits = b.buffer(width, outputs=True), b.buffer(config.vocab_size, outputs=True)
    b.select(chosen, x, width)
    norm(chosen, chosen, "output_norm")
    b.linear(logits, chosen, weights.head(), config.output_bias)
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
