"""Granite 3: Llama with four multipliers, of the embedding, the scores, each sublayer's share, the logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from azquant.architectures.base import Architecture, TensorRule, Weights
from azquant.architectures.blocks import DecoderProgram, decoder_rules
from azquant.architectures.decoder import hf_refuse, read_gguf, read_hf
from azquant.architectures.fields import gguf_fields, hf_fields
from azquant.architectures.llama import DECODER_SIZES, INV_FREQ, LlamaConfig, llama_block
from azquant.gguf import MetadataValue, keys
from azquant.program import ProgramSpec

__all__ = ["GRANITE", "GraniteConfig"]


@dataclass(frozen=True)
class GraniteConfig(LlamaConfig):
    """Hyperparameters of a Granite."""

    NAME: ClassVar[str] = "granite"

    attention_scale: float = 1.0
    """Scores are multiplied by it."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """What a sublayer adds is multiplied by it."""
    logit_scale: float = 1.0
    """Logits are divided by it."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> GraniteConfig:
        """From ``config.json``. Raises ConversionError for what is missing, impossible or not to be had."""
        fields = hf_fields(config)
        hf_refuse(fields, "granite", hidden_act=("silu", "swish"))
        return cls(
            **read_hf(fields, whole_width=True),
            attention_bias=fields.flag("attention_bias", default=False),
            mlp_bias=fields.flag("mlp_bias", default=False),
            attention_scale=fields.number("attention_multiplier", default=1.0),
            embedding_scale=fields.number("embedding_multiplier", default=1.0),
            residual_scale=fields.number("residual_multiplier", default=1.0),
            logit_scale=fields.number("logits_scaling", default=1.0),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> GraniteConfig:
        """From GGUF metadata as plain values. Raises ModelError for what is missing or impossible."""
        fields = gguf_fields(metadata, "granite")
        scales = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
        common = read_gguf(fields, honoured=scales)
        if not fields.flag("rope.scaling.finetuned", default=True):
            fields.fail("granite.rope.scaling.finetuned is false: models without positions are not supported")
        attention, embedding, residual, logit = (
            0.0 if fields.values.get(f"granite.{key}", 0) == 0 else fields.number(key) for key in scales
        )
        return cls(
            **common,
            attention_scale=attention or common["head_dim"] ** -0.5,
            embedding_scale=embedding or 1.0,
            residual_scale=residual or 1.0,
            logit_scale=logit or 1.0,
        )

    def own_metadata(self) -> dict[str, MetadataValue]:
        """The four multipliers."""
        return {
            "attention.scale": keys.f32(self.attention_scale),
            "embedding_scale": keys.f32(self.embedding_scale),
            "residual_scale": keys.f32(self.residual_scale),
            "logit_scale": keys.f32(self.logit_scale),
        }


def _rules(config: GraniteConfig) -> list[TensorRule]:
    return decoder_rules(config, lambda i: llama_block(config, i))


def _program(config: GraniteConfig, weights: Weights) -> ProgramSpec[Any]:
    p = DecoderProgram(config, weights, neox=False)
    width, residual = config.embedding_length, config.residual_scale
    p.embed(scale=config.embedding_scale)
    for i in range(config.block_count):
        blk = f"blk.{i}"
        p.norm(p.normed, p.x, f"{blk}.attn_norm")
        p.project(blk, p.normed)
        p.rope()
        p.attend(i, scale=config.attention_scale)
        p.linear(p.normed, p.attended, f"{blk}.attn_output")
        p.b.add(p.x, p.normed, p.x, width, scale=residual)
        p.norm(p.normed, p.x, f"{blk}.ffn_norm")
        p.gated(p.normed, p.normed, blk)
        p.b.add(p.x, p.normed, p.x, width, scale=residual)
    return p.finish(scale=1 / config.logit_scale)


GRANITE = Architecture(
    name="granite",
    hf_names=("GraniteForCausalLM",),
    config=GraniteConfig,
    rules=_rules,
    program=_program,
    prefixes=("model.", ""),
    hf_sizes=DECODER_SIZES,
    harmless=(INV_FREQ,),
)
