"""GGUF models with random weights, in the shapes that benchmarks compare.

    python benchmarks/random_models.py gpt2-134m out.gguf --type q4_0

Untied head, 1024 positions (or what --context says), no tokenizer (``no_vocab``). The weights are drawn
small enough that activations stay ordinary; speed does not depend on them.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from azquant.architectures import ARCHITECTURES
from azquant.architectures.base import TensorRule
from azquant.architectures.gpt2 import GPT2Config
from azquant.architectures.llama import LlamaConfig
from azquant.architectures.rope import Rope
from azquant.gguf import TensorSpec, keys, write_gguf
from azquant.ops import encode_rows
from azquant.types import GGMLType, get_type

VOCABULARY = 32000
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}


def gpt2(width: int, layers: int, heads: int, context: int) -> GPT2Config:
    """A GPT-2 of the given shape."""
    return GPT2Config(VOCABULARY, context, width, 4 * width, layers, heads, 1e-5)


def llama(width: int, layers: int, heads: int, kv_heads: int, hidden: int, context: int) -> LlamaConfig:
    """A Llama of the given shape."""
    dim = width // heads
    return LlamaConfig(
        VOCABULARY, context, width, hidden, layers, heads, kv_heads, dim, 1e-5, dim, Rope(10000.0, 1.0)
    )


SHAPES: dict[str, tuple[str, Any]] = {
    "gpt2-134m": ("gpt2", lambda context: gpt2(768, 12, 12, context)),
    "gpt2-369m": ("gpt2", lambda context: gpt2(1024, 24, 16, context)),
    "gpt2-1.0b": ("gpt2", lambda context: gpt2(1536, 32, 24, context)),
    "llama-134m": ("llama", lambda context: llama(768, 12, 12, 12, 2048, context)),
    "tinyllama-1.1b": ("llama", lambda context: llama(2048, 22, 32, 4, 5632, context)),
}


def _type_of(rule: TensorRule, wanted: GGMLType) -> GGMLType:
    """What llama-quantize would choose, as far as azquant has the types."""
    if len(rule.shape) == 1 or rule.name == "position_embd.weight":
        return get_type("f32")
    if rule.name == "output.weight" and wanted.name == "q4_0":
        return get_type("q6_k")
    return wanted


def write_model(name: str, path: Path, type: str = "q4_0", context: int = 1024) -> None:
    """Writes the model called ``name`` (a key of SHAPES) to ``path``, replacing what is there."""
    architecture_name, make = SHAPES[name]
    architecture, config = ARCHITECTURES[architecture_name], make(context)
    rules = [rule for rule in architecture.rules(config) if not rule.optional or rule.name == "output.weight"]
    specs = [TensorSpec(rule.name, rule.shape, _type_of(rule, get_type(type))) for rule in rules]

    def data(spec: TensorSpec) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(zlib.crc32(spec.name.encode()))
        columns = spec.shape[-1]
        rows = spec.shape[0] if len(spec.shape) == 2 else 1
        centre = 1.0 if spec.name.endswith("norm.weight") else 0.0
        for start in range(0, rows, 4096):
            band = min(4096, rows - start)
            values = rng.standard_normal((band, columns), dtype=np.float32) * 0.02 + centre
            yield encode_rows(values.astype(np.float32), spec.type)

    metadata = {
        "general.architecture": keys.string(architecture_name),
        "general.name": keys.string(name),
        "general.file_type": keys.u32(FILE_TYPES[type]),
        "general.quantization_version": keys.u32(2),
        **config.metadata(),
        "tokenizer.ggml.model": keys.string("no_vocab"),
    }
    write_gguf(path, metadata, specs, data, overwrite=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("path", type=Path)
    parser.add_argument("--type", default="q4_0", choices=FILE_TYPES)
    parser.add_argument("--context", type=int, default=1024)
    arguments = parser.parse_args()
    write_model(arguments.name, arguments.path, arguments.type, arguments.context)
