"""The pieces that decoder architectures are put together from: tensor rules, and steps of a program."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from azquant._lazy import np
from azquant.architectures.base import Constant, Keep, TensorRule, Transform, Weights
from azquant.architectures.decoder import RMS_EPSILON, DecoderConfig
from azquant.architectures.rope import frequencies
from azquant.program import ProgramBuilder, ProgramSpec, Ref

if TYPE_CHECKING:
    from azquant.program import Floats

__all__ = ["DecoderProgram", "decoder_rules", "linear_rules", "norm_rules"]

KEEP = Keep()

Bias = bool | None | str


def linear_rules(
    target: str, shape: tuple[int, int], source: str, transform: Transform = KEEP, bias: Bias = False
) -> list[TensorRule]:
    """Weight and bias of a linear layer, whose rows ``transform`` may reorder.

    ``bias``: whether there is one, ``None`` when only the tensors tell, ``"zeros"`` where the checkpoint has
    none but llama.cpp asks for one.
    """
    rules = [TensorRule(f"{target}.weight", shape, f"{source}.weight", transform)]
    if bias == "zeros":
        rules.append(TensorRule(f"{target}.bias", shape[:1], "", Constant((0.0,) * shape[0])))
    elif bias is not False:
        rules.append(
            TensorRule(f"{target}.bias", shape[:1], f"{source}.bias", transform, optional=bias is None)
        )
    return rules


def norm_rules(
    target: str, width: int, source: str, transform: Transform = KEEP, *, bias: bool = False
) -> list[TensorRule]:
    """Weight, and bias of a LayerNorm."""
    rules = [TensorRule(f"{target}.weight", (width,), f"{source}.weight", transform)]
    if bias:
        rules.append(TensorRule(f"{target}.bias", (width,), f"{source}.bias"))
    return rules


def decoder_rules(
    config: DecoderConfig,
    block: Callable[[int], list[TensorRule]],
    *,
    embedding: str = "embed_tokens",
    norm: list[TensorRule] | None = None,
    head: str = "lm_head",
    before: tuple[TensorRule, ...] = (),
) -> list[TensorRule]:
    """Embedding, ``before``, every layer's ``block``, last norm and head."""
    table = (config.vocab_size, config.embedding_length)
    rules = [TensorRule("token_embd.weight", table, f"{embedding}.weight"), *before]
    for i in range(config.block_count):
        rules += block(i)
    rules += norm_rules("output_norm", config.embedding_length, "norm") if norm is None else norm
    rules.append(TensorRule("output.weight", table, f"{head}.weight", optional=True))
    return rules


class DecoderProgram:
    """A decoder's program in the making: its buffers, and the steps that layers are made of.

    Weights are named as in GGUF files. ``x`` is the residual stream, ``normed`` what a sublayer reads.
    """

    def __init__(self, config: DecoderConfig, weights: Weights, *, neox: bool = True) -> None:
        self.b: ProgramBuilder[Any] = ProgramBuilder()
        self._config, self._weights, self._neox = config, weights, neox
        self.x, self.normed = self.b.buffer(config.embedding_length), self.b.buffer(config.embedding_length)
        self.query = self.b.buffer(config.query_rows + 2 * config.kv_rows)  # keys and values beside
        self.key = self.query.at(config.query_rows)
        self.value = self.key.at(config.kv_rows)
        self.attended = self.b.buffer(config.query_rows)
        divisors = weights.optional_vector("rope_freqs.weight")
        self.frequencies = frequencies(config.rope, config.rope_dimension, divisors)

    @cached_property
    def _inner(self) -> Ref:
        return self.b.buffer(2 * self._config.feed_forward_length)  # gate and up, or one activated

    @cached_property
    def _hidden(self) -> Ref:
        return self.b.buffer(self._config.feed_forward_length)

    def embed(self, scale: float = 1.0) -> None:
        """x = the tokens' rows of the embedding."""
        self.b.embed(self.x, self._weights.matrix("token_embd.weight"), scale=scale)

    def norm(self, out: Ref, a: Ref, name: str, *, n_head: int = 0, scale: float = 1.0) -> None:
        """RMSNorm or LayerNorm, as the config's epsilon says; ``scale`` multiplies its weight."""
        weight, eps = self._weights.vector(f"{name}.weight"), self._config.norm_epsilon
        if scale != 1.0:
            weight = np.asarray(weight) * np.float32(scale)
        if self._config.EPSILON == RMS_EPSILON:
            self.b.rms_norm(out, a, weight, eps, n_head=n_head)
        else:
            self.b.layer_norm(out, a, weight, self._weights.optional_vector(f"{name}.bias"), eps)

    def linear(
        self, out: Ref, a: Ref, name: str, *, activation: str | None = None, residual: Ref | None = None
    ) -> None:
        """out = activation(a · wᵀ + bias) + residual, with the bias where the file has one."""
        bias = self._weights.optional_vector(f"{name}.bias")
        matrix = self._weights.matrix(f"{name}.weight")
        self.b.linear(out, a, matrix, bias, activation=activation, residual=residual)

    def project(self, blk: str, a: Ref) -> None:
        """Queries, keys and values of a, each from its own matrix."""
        for out, name in ((self.query, "attn_q"), (self.key, "attn_k"), (self.value, "attn_v")):
            self.linear(out, a, f"{blk}.{name}")

    def norm_heads(self, blk: str) -> None:
        """Every query head and every key head normed by itself."""
        self.norm(self.query, self.query, f"{blk}.attn_q_norm", n_head=self._config.head_count)
        self.norm(self.key, self.key, f"{blk}.attn_k_norm", n_head=self._config.head_count_kv)

    def rope(self, turns: Floats | None = None, *, scale: float = 1.0) -> None:
        """Queries and keys, which lie side by side, turned by their positions; turned elements are scaled."""
        heads = self._config.head_count + self._config.head_count_kv
        chosen = self.frequencies if turns is None else turns
        self.b.rope(self.query, heads, self._config.head_dim, chosen, neox=self._neox, scale=scale)

    def attend(self, layer: int, *, scale: float | None = None, softcap: float = 0.0) -> None:
        """attended = attention of the queries over the layer's cache; scale 1/sqrt(head size) by default."""
        c = self._config
        self.b.attention(
            self.attended,
            self.query,
            layer,
            c.head_count,
            c.head_count_kv,
            c.head_dim,
            1 / math.sqrt(c.head_dim) if scale is None else scale,
            window=c.window(layer),
            softcap=softcap,
        )

    def gated(
        self, out: Ref, a: Ref, blk: str, activation: str = "silu", *, residual: Ref | None = None
    ) -> None:
        """Feed-forward with a gate: down · (activation(gate · a) * (up · a))."""
        width = self._config.feed_forward_length
        self.linear(self._inner, a, f"{blk}.ffn_gate")
        self.linear(self._inner.at(width), a, f"{blk}.ffn_up")
        self.b.glu(self._hidden, self._inner, self._inner.at(width), width, activation)
        self.linear(out, self._hidden, f"{blk}.ffn_down", residual=residual)

    def feed_forward(self, out: Ref, a: Ref, blk: str, *, residual: Ref | None = None) -> None:
        """``gated`` with SiLU, by the experts that a router chooses where the model has them."""
        if self._config.experts is None:
            self.gated(out, a, blk, residual=residual)
            return
        router = self._weights.matrix(f"{blk}.ffn_gate_inp.weight")
        gates, ups, downs = (
            self._weights.experts(f"{blk}.ffn_{part}_exps.weight") for part in ("gate", "up", "down")
        )
        experts = list(zip(gates, ups, downs, strict=True))
        self.b.experts(out, a, router, experts, self._config.experts.used, "silu", residual=residual)

    def gated_fused(self, out: Ref, a: Ref, blk: str, *, residual: Ref | None = None) -> None:
        """The same with SiLU, where ``ffn_up`` holds gate and up one after the other."""
        width = self._config.feed_forward_length
        self.linear(self._inner, a, f"{blk}.ffn_up")
        self.b.glu(self._hidden, self._inner, self._inner.at(width), width, "silu")
        self.linear(out, self._hidden, f"{blk}.ffn_down", residual=residual)

    def plain(self, out: Ref, a: Ref, blk: str, activation: str, *, residual: Ref | None = None) -> None:
        """Feed-forward without a gate: down · activation(up · a)."""
        self.linear(self._hidden, a, f"{blk}.ffn_up", activation=activation)
        self.linear(out, self._hidden, f"{blk}.ffn_down", residual=residual)

    def finish(self, *, scale: float = 1.0, softcap: float = 0.0) -> ProgramSpec[Any]:
        """Last norm (times ``scale``), head and soft-cap, for the rows whose logits are asked for."""
        c, b = self._config, self.b
        chosen, logits = b.buffer(c.embedding_length, outputs=True), b.buffer(c.vocab_size, outputs=True)
        b.select(chosen, self.x, c.embedding_length)
        self.norm(chosen, chosen, "output_norm", scale=scale)
        b.linear(logits, chosen, self._weights.head())
        if softcap:
            b.softcap(logits, logits, c.vocab_size, softcap)
        return b.build(n_layer=c.block_count, n_head_kv=c.head_count_kv, head_dim=c.head_dim)
