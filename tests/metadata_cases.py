"""Checkpoints with model cards and tokenizers, the same in every run: nothing is trained, nothing drawn."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from convert_support import (
    GPT2_CONFIG,
    LLAMA_CONFIG,
    MIXTRAL_CONFIG,
    gpt2_tensors,
    llama_tensors,
    write_checkpoint,
)
from tokenizer_support import LLAMA3, QWEN2, sentencepiece_metadata, sentencepiece_model, split
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from azquant.gguf import keys

MERGES = (("a", "z"), ("Ġ", "a"), ("az", "a"), ("l", "l"), ("i", "n"), ("Ġa", "z"), ("ll", "a"), ("1", "2"))
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def _byte_bpe(
    pre_tokenizer: Any, special: Sequence[str], added: Sequence[str] = (), ignore_merges: bool = False
) -> Tokenizer:
    """Every byte, the results of MERGES, then the added tokens."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(MERGES), ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in added])
    return tokenizer


def _write(
    folder: Path, config: dict[str, Any], texts: dict[str, str], files: dict[str, Any], size: int
) -> Path:
    config = {**config, "vocab_size": size}
    tensors = gpt2_tensors if config["model_type"] == "gpt2" else llama_tensors
    extra = {}
    if config["model_type"] == "qwen2":
        extra = _qkv_biases(config)
    write_checkpoint(folder, config, tensors(config) | extra)
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def _qkv_biases(config: dict[str, Any]) -> dict[str, Any]:
    weights = llama_tensors(config)
    return {
        name.replace(".weight", ".bias"): value[:, 0].copy()
        for name, value in weights.items()
        if any(f".{part}_proj." in name for part in "qkv")
    }


def _gpt2(root: Path) -> Path:
    """The classic, with a model card and sampling in generation_config.json."""
    tokenizer = _byte_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"])
    card = """---
license: apache-2.0
language: [az, tr]
tags:
  - text-generation
  - azerbaijani
datasets: [LocalDoc/news, wikimedia/wikipedia]
base_model:
  - LocalDoc/az-base-134m
pipeline_tag: text-generation
library_name: transformers
---
# A model
"""
    size = tokenizer.get_vocab_size()
    end = {"bos_token_id": size - 1, "eos_token_id": size - 1}
    return _write(
        root / "az-llm-134m-chat-v1.2",
        {**GPT2_CONFIG, **end, "n_ctx": 16},
        {"README.md": card, "tokenizer.json": tokenizer.to_str()},
        {
            "tokenizer_config.json": {
                "tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>",
                "bos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "add_prefix_space": False,
            },
            "generation_config.json": {
                **end, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40,
                "repetition_penalty": 1.1, "min_p": 0.05,
            },
        },
        size,
    )  # fmt: skip


def _llama3(root: Path) -> Path:
    """Byte-level BPE as Llama 3's, a chat template, a padding token, a licence of its own name."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<pad>"]
    tokenizer = _byte_bpe(split(LLAMA3), special, ignore_merges=True)
    size = tokenizer.get_vocab_size()
    ids = {"bos_token_id": size - 5, "eos_token_id": [size - 4, size - 2]}
    card = "---\nlicense: other\nlicense_name: az-1.0\nlicense_link: https://example.org/az\n"
    card += "language: az\nauthor: A. Z.\nbase_model: localdoc-team/nar-base-1b-v2\n---\n"
    return _write(
        root / "Nar-1B-Instruct",
        {**LLAMA_CONFIG, **ids, "rope_theta": 500000.0, "_name_or_path": "localdoc-team/Nar-1B-Instruct"},
        {"README.md": card, "tokenizer.json": tokenizer.to_str()},
        {
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>",
                "eos_token": "<|im_end|>", "pad_token": "<pad>", "add_bos_token": True,
                "add_eos_token": False, "chat_template": TEMPLATE,
            },
            "generation_config.json": {**ids, "do_sample": True, "temperature": 0.6, "top_p": 0.9},
        },
        size,
    )  # fmt: skip


def _qwen2(root: Path) -> Path:
    """More rows than tokens, an added token that is no special one, the template in a file of its own."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _byte_bpe(split(QWEN2), special, ["<tool_call>", "</tool_call>"])
    size = tokenizer.get_vocab_size()
    ids = {"bos_token_id": 264, "eos_token_id": 266}
    config = {**LLAMA_CONFIG, **ids, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    del config["head_dim"]
    return _write(
        root / "qwen-az",
        config,
        {"chat_template.jinja": TEMPLATE, "tokenizer.json": tokenizer.to_str()},
        {
            "tokenizer_config.json": {
                "tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>", "add_bos_token": False,
            },
            "generation_config.json": {**ids, "do_sample": False},
        },
        size + 5,
    )  # fmt: skip


def _mixtral(root: Path) -> Path:
    """Experts, whose number is part of the size."""
    tokenizer = _byte_bpe(split(LLAMA3), ["<s>", "</s>"], ignore_merges=True)
    size = tokenizer.get_vocab_size()
    ids = {"bos_token_id": size - 2, "eos_token_id": size - 1}
    return _write(
        root / "nar-mixture",
        {**MIXTRAL_CONFIG, **ids},
        {"tokenizer.json": tokenizer.to_str()},
        {
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
                "add_bos_token": True, "add_eos_token": False,
            },
        },
        size,
    )  # fmt: skip


_SPM = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_IDS = {"bos_token_id": 1, "eos_token_id": 2}


def _sentencepiece(root: Path) -> Path:
    """tokenizer.model as Llama 2's."""
    metadata = sentencepiece_metadata()
    model = sentencepiece_model({key: _Listed(value) for key, value in metadata.items()})
    folder = _write(
        root / "Mini-Llama-2-v2",
        {**LLAMA_CONFIG, **_IDS},
        {"README.md": "---\nlicense: mit\n---\n"},
        {
            "tokenizer_config.json": {
                **_SPM, "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
                "legacy": False, "pad_token": None,
            },
        },
        len(metadata[keys.TOKENS]),
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.serialized_model_proto())
    return folder


class _Listed(list[Any]):
    """What sentencepiece_model takes: a list that gives itself."""

    def __new__(cls, value: Any) -> Any:
        return super().__new__(cls) if isinstance(value, list) else value

    def tolist(self) -> list[Any]:
        return list(self)


def _json_sentencepiece(root: Path) -> Path:
    """The same kind of vocabulary as a tokenizer.json, as recent checkpoints have it: no tokenizer.model."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "z", "▁a", "az"]
    merges = [("▁", "a"), ("a", "z")]
    tokenizer = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return _write(
        root / "tiny_json_llama",
        {**LLAMA_CONFIG, **_IDS},
        {"tokenizer.json": tokenizer.to_str()},
        {
            "tokenizer_config.json": {
                **_SPM, "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
            },
        },
        tokenizer.get_vocab_size(),
    )  # fmt: skip


CASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "gpt2": (_gpt2, "gpt-2"),
    "llama3": (_llama3, "llama-bpe"),
    "qwen2": (_qwen2, "qwen2"),
    "mixtral": (_mixtral, "llama-bpe"),
    "sentencepiece": (_sentencepiece, ""),
    "json sentencepiece": (_json_sentencepiece, ""),
}
"""By name: what writes the checkpoint into a folder and gives its place; the pre-tokenizer's name."""
