"""GPT-2 as people write it themselves: nanoGPT's modules, and those of the "let's build GPT" course.

Both are GPT-2's graph under other names, with ``nn.Linear`` matrices (not transposed) and biases where their
author wanted them. GGUF's gpt2 needs every bias, so those that are not there are written as zeros.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from azquant.architectures.base import Architecture, Constant, Keep, ScaleRows, TensorRule, Transform
from azquant.architectures.gpt2 import GPT2, GPT2Config, scaled_for_relu

__all__ = ["COURSE", "NANOGPT", "Layout", "layout_architecture"]


@dataclass(frozen=True)
class Layout:
    """The module names of one way to write a GPT-2. Those of a block follow ``block`` and its number."""

    name: str
    embedding: str
    positions: str
    block: str
    attn_norm: str
    attn_qkv: str
    attn_output: str
    ffn_norm: str
    ffn_up: str
    ffn_down: str
    output_norm: str = "ln_f"
    output: str = "lm_head"
    masks: tuple[str, ...] = ()
    """Patterns of buffers that hold the causal mask."""

    @property
    def parts(self) -> dict[str, str]:
        """GGUF's name of each part of a block, and this layout's."""
        names = ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down")
        return {name: getattr(self, name) for name in names}


NANOGPT = Layout(
    name="nanoGPT",
    embedding="transformer.wte",
    positions="transformer.wpe",
    block="transformer.h",
    attn_norm="ln_1",
    attn_qkv="attn.c_attn",
    attn_output="attn.c_proj",
    ffn_norm="ln_2",
    ffn_up="mlp.c_fc",
    ffn_down="mlp.c_proj",
    output_norm="transformer.ln_f",
    masks=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
)
"""Names of github.com/karpathy/nanoGPT, model.py."""

COURSE = Layout(
    name="from-scratch GPT",
    embedding="token_embedding_table",
    positions="position_embedding_table",
    block="blocks",
    attn_norm="ln1",
    attn_qkv="sa.heads",  # one module a head in the checkpoint; fused under this name
    attn_output="sa.proj",
    ffn_norm="ln2",
    ffn_up="ffwd.net.0",
    ffn_down="ffwd.net.2",
    masks=(r"blocks\.\d+\.sa\.heads\.\d+\.tril",),
)
"""Names of github.com/karpathy/ng-video-lecture, gpt.py, and of the many courses that follow it."""


def layout_architecture(layout: Layout, present: Collection[str]) -> Architecture[GPT2Config]:
    """The gpt2 architecture for a checkpoint of ``layout`` that has the tensors ``present``.

    Whether a module has a bias is read off block 0 (off itself for the last norm): a bias that then lacks in
    another block is a missing tensor, not a zero.
    """

    def rules(config: GPT2Config) -> list[TensorRule]:
        return _rules(config, layout, present)

    masks = tuple(re.compile(pattern) for pattern in layout.masks)
    return replace(GPT2, rules=rules, prefixes=("",), hf_names=(), hf_sizes=(), harmless=masks)


def _rules(config: GPT2Config, layout: Layout, present: Collection[str]) -> list[TensorRule]:
    width, inner = config.embedding_length, config.feed_forward_length
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (width,),
        "attn_qkv": (3 * width, width),
        "attn_output": (width, width),
        "ffn_norm": (width,),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    rules = [
        TensorRule("token_embd.weight", (config.vocab_size, width), f"{layout.embedding}.weight"),
        TensorRule("position_embd.weight", (config.context_length, width), f"{layout.positions}.weight"),
    ]

    def both(name: str, shape: tuple[int, ...], source: str, example: str) -> list[TensorRule]:
        bias = TensorRule(f"{name}.bias", shape[:1], f"{source}.bias")
        if f"{example}.bias" not in present:
            bias = TensorRule(bias.name, bias.shape, "", Constant((0.0,) * shape[0]))
        return [TensorRule(f"{name}.weight", shape, f"{source}.weight"), bias]

    factor = config.query_factor(0)
    queries: Transform = Keep() if factor == 1.0 else ScaleRows(Keep(), width, factor)
    for i in range(config.block_count):
        for part, source in layout.parts.items():
            named = f"{layout.block}.{i}.{source}", f"{layout.block}.0.{source}"
            for rule in both(f"blk.{i}.{part}", shapes[part], *named):
                if part == "attn_qkv" and rule.source:
                    rule = replace(rule, transform=queries)
                if config.activation == "relu" and rule.source and rule.name != f"blk.{i}.ffn_down.bias":
                    rule = scaled_for_relu(rule) if part in ("ffn_up", "ffn_down") else rule
                rules.append(rule)
    rules += both("output_norm", (width,), layout.output_norm, layout.output_norm)
    head = TensorRule("output.weight", (config.vocab_size, width), f"{layout.output}.weight", optional=True)
    return [*rules, head]
