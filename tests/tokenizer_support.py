"""Tokenizers trained on the spot, and what judges ours: tokenizers, sentencepiece and llama.cpp."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from azquant.conversion.tokenizer import tokenizer_metadata
from azquant.errors import ConversionWarning
from azquant.gguf import MetadataValue, ValueType, keys, open_gguf
from azquant.tokenizer import Tokenizer as OurTokenizer
from azquant.tokenizer import load_tokenizer

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
    r"|\s+(?!\S)|\s+"
)

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
EOS = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}

TEMPLATE = tokenizers.processors.TemplateProcessing(
    single="<|endoftext|> $A [PAD]", special_tokens=[("<|endoftext|>", 0), ("[PAD]", 1)]
)

# Azerbaijani with apostrophe suffixes, digits of three scripts, all sorts of white space, marks, emoji.
PROSE = (
    "Azərbaycan Respublikası Cənubi Qafqazda yerləşir. Bakı'nın əhalisi 2 293 100 nəfərdir, "
    "Ankara'da isə 5 747 325. "
    "Şəhərin küçələri işıqlı, dənizi göy, günəşi isti idi; o, gülümsəyib dedi: “Gəlin, çay içək!”\n"
    "The quick brown fox jumps over the lazy dog 1234567 times; they're sure it's what I'd call fun?\r\n"
    "\tdef f(x):\n        return x ** 2  # 3.14159\n\n\n   Привет, мир! 日本語のテキスト。 हिन्दी ٣٤٥ ½²③ Ǆǅ "
    "\U0001f600\u200d\U0001f308 "
    "e\u0301a\u0308  I'M HERE'S I'LL \u00a0\u3000\u2028 _x_ --- === !!! ...   "
)
TEXTS = (
    PROSE,
    "",
    " ",
    "   a",
    "\n\n \n",
    "a\u0000b",
    "\ufeffx",
    "x<|endoftext|> y",
    "'S 'ſ İstanbul'da q\u0130 \x85",
)


def split(pattern: str, behavior: str = "isolated", invert: bool = False) -> Any:
    """A Split at a regular expression, then ByteLevel without one of its own."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior, invert),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train(pre_tokenizer: Any = None, vocab_size: int = 420, ignore_merges: bool = False) -> Tokenizer:
    """A byte-level BPE trained on PROSE, with ``<|endoftext|>`` = 0 and ``[PAD]`` = 1."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "[PAD]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROSE] * 3, trainer)
    return tokenizer


def save(folder: Path, tokenizer: Tokenizer | dict[str, Any], **files: Any) -> Path:
    """Write tokenizer.json and, from the keywords, further JSON files (``tokenizer_config={...}``)."""
    folder.mkdir(exist_ok=True)
    content = tokenizer if isinstance(tokenizer, dict) else as_json(tokenizer)
    for name, value in {"tokenizer": content, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def as_json(tokenizer: Tokenizer) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content


def plain(metadata: Mapping[str, MetadataValue], *without: str) -> dict[str, Any]:
    """Metadata as a reader gives it, less the keys ``without``."""
    return {
        key: _listed(item.value) if item.type == ValueType.ARRAY else item.value
        for key, item in metadata.items()
        if key not in without
    }


def _listed(value: Any) -> list[Any]:
    items: list[Any] = value.tolist() if isinstance(value, np.ndarray) else list(value)
    return items


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file, its arrays lazy as the reader gives them."""
    with open_gguf(path) as file:
        return dict(file.metadata)


def byte_level_metadata(tokenizer: Tokenizer, pre: str = "gpt-2", **more: Any) -> dict[str, Any]:
    """What another converter would write for ``tokenizer``: no tokenizer.json in it."""
    content = as_json(tokenizer)
    tokens = [text for text, _ in sorted(content["model"]["vocab"].items(), key=lambda item: item[1])]
    special = {entry["id"] for entry in content["added_tokens"]}
    return {
        keys.TOKENIZER_MODEL: "gpt2",
        keys.TOKENIZER_PRE: pre,
        keys.TOKENS: tokens,
        keys.TOKEN_TYPE: [3 if token_id in special else 1 for token_id in range(len(tokens))],
        keys.MERGES: [" ".join(pair) for pair in content["model"]["merges"]],
        keys.BOS_TOKEN_ID: 0,
        keys.EOS_TOKEN_ID: 0,
        **more,
    }


def sentencepiece_metadata(**more: Any) -> dict[str, Any]:
    """A tiny SentencePiece vocabulary: bytes, "a", "b", and a space before "a"."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab"]
    scores = [0.0] * 259 + [-1e9, -1e9, -1e9, -1.0, -2.0]
    types = [2, 3, 3] + [6] * 256 + [1] * 5
    return {
        keys.TOKENIZER_MODEL: "llama",
        keys.TOKENS: tokens,
        keys.SCORES: scores,
        keys.TOKEN_TYPE: types,
        keys.BOS_TOKEN_ID: 1,
        keys.EOS_TOKEN_ID: 2,
        keys.UNKNOWN_TOKEN_ID: 0,
        **more,
    }


def sentencepiece_model(metadata: Mapping[str, Any]) -> Any:
    """The real sentencepiece with the pieces of a GGUF file. Its protobuf is written here by hand."""
    sentencepiece = pytest.importorskip("sentencepiece")

    def varint(number: int) -> bytes:
        head = b""
        while number > 127:
            head += bytes([number & 127 | 128])
            number >>= 7
        return head + bytes([number])

    def message(field: int, content: bytes) -> bytes:
        return varint(field << 3 | 2) + varint(len(content)) + content

    def number(field: int, value: int) -> bytes:
        return varint(field << 3) + varint(value)

    lists = (metadata[key].tolist() for key in (keys.TOKENS, keys.SCORES, keys.TOKEN_TYPE))
    pieces = zip(*lists, strict=True)
    model = b"".join(
        message(1, message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + number(3, kind))
        for text, score, kind in pieces
    )
    model += message(2, number(3, 2) + number(35, 1))  # trainer: BPE, byte fallback
    # normalizer: identity, with a dummy prefix, extra spaces kept, spaces escaped
    model += message(3, message(1, b"identity") + number(3, 1) + number(4, 0) + number(5, 1))
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def convert(folder: Path, vocab_size: int = 420, /, **config: Any) -> dict[str, MetadataValue]:
    """Convert where no warning may be issued (pytest makes errors of them)."""
    return tokenizer_metadata(folder, vocab_size, config)


def convert_warned(
    folder: Path, vocab_size: int = 420, /, **config: Any
) -> tuple[dict[str, MetadataValue], str]:
    """Convert, and return the warnings too, joined."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metadata = tokenizer_metadata(folder, vocab_size, config)
    assert all(issubclass(item.category, ConversionWarning) for item in caught)
    return metadata, "\n".join(str(item.message) for item in caught)


def both(metadata: dict[str, MetadataValue]) -> tuple[OurTokenizer, OurTokenizer]:
    """The tokenizer with the carried tokenizer.json, and rebuilt without it."""
    return load_tokenizer(plain(metadata)), load_tokenizer(plain(metadata, keys.TOKENIZER_JSON))


class LlamaCpp:
    """llama.cpp as a tokenizer, in a process of its own.

    Dropping an xllamacpp server can wait for ever (it misses a stop that comes before its loop runs); that
    must not befall the test run. So servers live until their process is killed.
    """

    def __init__(self) -> None:
        pytest.importorskip("xllamacpp")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LLAMA_CPP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def encode(
        self, path: Path, metadata: Mapping[str, MetadataValue], texts: Sequence[str]
    ) -> list[list[int]]:
        """Write a GPT-2 of zeros around ``metadata`` to ``path``, load it there, and tokenize ``texts``."""
        _write_empty_gpt2(path, metadata)
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({"path": str(path), "texts": list(texts)}), file=self._process.stdin, flush=True)
        ids: list[list[int]] = json.loads(self._process.stdout.readline())
        return ids

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


_LLAMA_CPP = """
import json, sys, urllib.request, xllamacpp
servers = []
for line in sys.stdin:
    job = json.loads(line)
    params = xllamacpp.CommonParams()
    params.model.path = job["path"]
    params.n_ctx = 64
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = -1
    params.cpuparams.n_threads = 1
    servers.append(xllamacpp.Server(params))
    answers = []
    for text in job["texts"]:
        body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(servers[-1].listening_address + "/tokenize", body, head)
        answers.append(json.load(urllib.request.urlopen(request, timeout=30))["tokens"])
    print(json.dumps(answers), flush=True)
"""


def _write_empty_gpt2(path: Path, metadata: Mapping[str, MetadataValue]) -> None:
    width, n_vocab = 32, len(metadata[keys.TOKENS].value)
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(1)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(n_vocab)
    for key, item in metadata.items():
        if item.type == ValueType.ARRAY:
            assert item.element_type is not None
            kind = gguf.GGUFValueType(int(item.element_type))
            writer.add_key_value(key, list(item.value), gguf.GGUFValueType.ARRAY, sub_type=kind)
        else:
            writer.add_key_value(key, item.value, gguf.GGUFValueType(int(item.type)))
    shapes: dict[str, Sequence[int]] = {
        "token_embd.weight": (n_vocab, width),
        "position_embd.weight": (64, width),
    }
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for name, rows in (
        ("attn_qkv", 3 * width),
        ("attn_output", width),
        ("ffn_up", width),
        ("ffn_down", width),
    ):
        shapes |= {f"blk.0.{name}.weight": (rows, width), f"blk.0.{name}.bias": (rows,)}
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
