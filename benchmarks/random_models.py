"""GGUF models with random weights, in the shapes that benchmarks compare.

    python benchmarks/random_models.py gpt2-134m out.gguf --type q4_0

Untied head, 1024 positions (or what --context says), a made-up vocabulary of 32,000 tokens. Types are those
that llama-quantize would choose (a Q4_0 file has a Q6_K head). The weights are drawn small enough that
activations stay ordinary; speed does not depend on them. They go straight into the file, band by band.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from azquant.architectures import ARCHITECTURES
from azquant.architectures.gpt2 import GPT2Config
from azquant.architectures.llama import LlamaConfig
from azquant.architectures.rope import Rope
from azquant.conversion.recipe import TARGETS, Weight, choose_types
from azquant.conversion.recipe import Model as RecipeModel
from azquant.gguf import TensorSpec, ValueType, keys, open_gguf, write_gguf
from azquant.gguf.keys import TokenType
from azquant.ops import encode_rows
from azquant.pretokenizer import CHAR_TO_BYTE

VOCABULARY = 32000
VERSION = 2  # of what is drawn: a file of another version is made again


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


def _joined(first: list[str], count: int) -> tuple[list[str], list[tuple[str, str]]]:
    """``count`` tokens made by joining two earlier ones, and the pairs."""
    rng = np.random.default_rng(0)
    tokens, known, pairs = list(first), set(first), []
    while len(pairs) < count:
        left, right = (tokens[i] for i in rng.integers(0, len(tokens), 2))
        if len(left) + len(right) <= 12 and left + right not in known:
            known.add(left + right)
            tokens.append(left + right)
            pairs.append((left, right))
    return tokens, pairs


def _byte_level_vocabulary() -> dict[str, Any]:
    """Byte-level BPE, as GPT-2's."""
    tokens, pairs = _joined(list(CHAR_TO_BYTE), VOCABULARY - 256 - 1)
    kinds = [TokenType.NORMAL] * (VOCABULARY - 1) + [TokenType.CONTROL]
    return {
        keys.TOKENIZER_MODEL: keys.string("gpt2"),
        keys.TOKENIZER_PRE: keys.string("gpt-2"),
        keys.TOKENS: keys.array(ValueType.STRING, [*tokens, "<|endoftext|>"]),
        keys.TOKEN_TYPE: keys.array(ValueType.INT32, kinds),
        keys.MERGES: keys.array(ValueType.STRING, [" ".join(pair) for pair in pairs]),
        keys.BOS_TOKEN_ID: keys.u32(VOCABULARY - 1),
        keys.EOS_TOKEN_ID: keys.u32(VOCABULARY - 1),
    }


def _sentencepiece_vocabulary() -> dict[str, Any]:
    """SentencePiece with scores, as Llama's."""
    letters = ["▁", *map(chr, range(33, 127)), *"əƏğĞıİöÖşŞüÜçÇ"]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens, _ = _joined(letters, VOCABULARY - len(special) - len(letters))
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    kinds += [TokenType.NORMAL] * len(tokens)
    scores = [0.0] * len(special) + [-float(i) for i in range(len(tokens))]
    return {
        keys.TOKENIZER_MODEL: keys.string("llama"),
        keys.TOKENIZER_PRE: keys.string("default"),
        keys.TOKENS: keys.array(ValueType.STRING, special + tokens),
        keys.TOKEN_TYPE: keys.array(ValueType.INT32, kinds),
        keys.SCORES: keys.array(ValueType.FLOAT32, scores),
        keys.BOS_TOKEN_ID: keys.u32(1),
        keys.EOS_TOKEN_ID: keys.u32(2),
        keys.UNKNOWN_TOKEN_ID: keys.u32(0),
    }


def write_model(name: str, path: Path, type: str = "q4_0", context: int = 1024) -> None:
    """Writes the model called ``name`` (a key of SHAPES) to ``path``, replacing what is there."""
    architecture_name, make = SHAPES[name]
    architecture, config, target = ARCHITECTURES[architecture_name], make(context), TARGETS[type]
    rules = [rule for rule in architecture.rules(config) if not rule.optional or rule.name == "output.weight"]
    shape = RecipeModel(architecture_name, config.block_count)
    chosen = choose_types([Weight(rule.name, rule.shape, None) for rule in rules], target, shape)
    specs = [TensorSpec(rule.name, rule.shape, chosen[rule.name].type) for rule in rules]

    def data(spec: TensorSpec) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(zlib.crc32(spec.name.encode()))
        columns = spec.shape[-1]
        rows = spec.shape[0] if len(spec.shape) == 2 else 1
        centre = 1.0 if spec.name.endswith("norm.weight") else 0.0
        for start in range(0, rows, 4096):
            band = min(4096, rows - start)
            values = rng.standard_normal((band, columns), dtype=np.float32) * 0.02 + centre
            yield encode_rows(values.astype(np.float32), spec.type)

    vocabulary = _byte_level_vocabulary() if architecture_name == "gpt2" else _sentencepiece_vocabulary()
    metadata = {
        keys.ARCHITECTURE: keys.string(architecture_name),
        "general.name": keys.string(name),
        "general.version": keys.string(f"random weights {VERSION}"),
        "general.file_type": keys.u32(target.file_type),
        "general.quantization_version": keys.u32(2),
        **config.metadata(),
        **vocabulary,
    }
    write_gguf(path, metadata, specs, data, overwrite=True)


def cached_model(name: str, folder: Path, type: str = "q4_0", context: int = 1024) -> Path:
    """The model called ``name`` in ``folder``, made when it is not there."""
    path = folder / f"{name}-{context}-{type}.gguf"
    if path.exists():
        with open_gguf(path) as file:
            if file.metadata.get("general.version") == f"random weights {VERSION}":
                return path
    folder.mkdir(parents=True, exist_ok=True)
    write_model(name, path, type, context)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("path", type=Path)
    parser.add_argument("--type", default="q4_0", choices=TARGETS)
    parser.add_argument("--context", type=int, default=1024)
    arguments = parser.parse_args()
    write_model(arguments.name, arguments.path, arguments.type, arguments.context)
