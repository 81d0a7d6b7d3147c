"""Mixtures of experts: how many a model has, their tensors, and what llama.cpp's graphs can say of them.

A router rates all experts for every token; the best few compute, and their results are summed by the softmax
of their ratings. GGUF stacks the experts' matrices in one tensor each of gate, up and down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from azquant.architectures.base import Stack, TensorRule
from azquant.architectures.fields import Fields
from azquant.gguf import MetadataValue, keys

__all__ = ["EXPERT_SIZES", "MAX_EXPERTS", "Experts", "expert_rules", "gguf_experts", "hf_experts"]

MAX_EXPERTS = 1024
"""Most experts a layer may have (llama.cpp's LLAMA_MAX_EXPERTS)."""

EXPERT_SIZES = ("num_local_experts", "num_experts", "moe_intermediate_size")
"""Keys of config.json that decide shapes."""


@dataclass(frozen=True)
class Experts:
    """The experts of every layer."""

    count: int
    used: int
    """How many compute for each token."""
    length: int
    """Rows of an expert's gate."""

    def metadata(self) -> dict[str, MetadataValue]:
        """The keys that every mixture has, without the architecture's name before them."""
        return {"expert_count": keys.u32(self.count), "expert_used_count": keys.u32(self.used)}


def hf_experts(fields: Fields, *, count: int, used: int, length: int) -> Experts:
    """From ``config.json``; ``count`` and ``used`` are transformers' defaults."""
    found = fields.integer("num_local_experts", "num_experts", default=count, high=MAX_EXPERTS)
    return Experts(found, fields.integer("num_experts_per_tok", default=used, high=found), length)


def gguf_experts(fields: Fields, length: int, *, required: bool = False) -> Experts | None:
    """From a GGUF file; ``None`` where the model has none, which ``required`` refuses.

    ``length`` is an expert's. Fails for other ways of choosing or weighing experts than the best by softmax.
    """
    count = fields.integer("expert_count", default=0, low=int(required), high=MAX_EXPERTS)
    used = fields.integer("expert_used_count", default=0, low=int(count > 0), high=count)
    for key, harmless in (
        ("expert_gating_func", (0, 1)),  # not said; softmax
        ("expert_group_count", (0, 1)),
        ("expert_shared_count", (0,)),
        ("expert_shared_feed_forward_length", (0,)),
        ("expert_weights_norm", (True,)),
        ("expert_weights_scale", (0, 1)),
    ):
        value = fields.values.get(fields.prefix + key)
        if value is not None and not any(value == known for known in harmless):
            fields.fail(f"{fields.prefix}{key} is {value!r:.60}, which is not supported")
    return Experts(count, used, length) if count else None


def expert_rules(
    experts: Experts, width: int, blk: str, module: str, names: Sequence[str]
) -> list[TensorRule]:
    """Router and experts of a layer; ``names`` are what the checkpoint calls gate, up and down."""
    count, length = experts.count, experts.length
    rules = [TensorRule(f"{blk}.ffn_gate_inp.weight", (count, width), f"{module}.gate.weight")]
    shapes = ((count, length, width), (count, length, width), (count, width, length))
    for part, name, shape in zip(("gate", "up", "down"), names, shapes, strict=True):
        parts = tuple(f"{module}.experts.{i}.{name}.weight" for i in range(count))
        source = f"{module}.experts.*.{name}.weight"
        rules.append(TensorRule(f"{blk}.ffn_{part}_exps.weight", shape, source, Stack(), parts=parts))
    return rules
