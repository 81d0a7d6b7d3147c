"""Small models with tokenizers for the engine's tests, and a recorder of every logit they give."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from convert_support import (
    GPT2_CONFIG,
    LLAMA_CONFIG,
    MIXTRAL_CONFIG,
    gpt2_tensors,
    llama_tensors,
    write_checkpoint,
)
from tokenizers import decoders, models, pre_tokenizers

import azquant
from azquant.engine.request import Request

END = "<|endoftext|>"
N_VOCAB = 257


def byte_tokenizer() -> tokenizers.Tokenizer:
    """A token for each byte and one for the end: every character but ASCII is spread over several tokens."""
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


def tiny_model(
    folder: Path, architecture: str, type_: str = "q4_0", template: str | None = None, **changes: Any
) -> Path:
    """A random model of ``architecture`` with :func:`byte_tokenizer`, as a GGUF file."""
    base, make = {
        "gpt2": (GPT2_CONFIG, gpt2_tensors),
        "llama": (LLAMA_CONFIG, llama_tensors),
        "mixtral": (MIXTRAL_CONFIG, llama_tensors),
    }[architecture]
    config = {**base, "vocab_size": N_VOCAB, "eos_token_id": 256, "bos_token_id": 256, **changes}
    tensors = {name: array * np.float32(0.3) for name, array in make(config).items()}
    write_checkpoint(folder / "hf", config, tensors)
    byte_tokenizer().save(str(folder / "hf" / "tokenizer.json"))
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": END, "bos_token": END}
    if template is not None:
        settings["chat_template"] = template
    (folder / "hf" / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    path = folder / f"{architecture}-{type_}.gguf"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", azquant.errors.ConversionWarning)
        azquant.convert(folder / "hf", path, type_)
    return path


@contextmanager
def recorded_logits(patch: pytest.MonkeyPatch) -> Iterator[dict[tuple[int, ...], list[bytes]]]:
    """Prompt tokens -> the bytes of each logits row that an answer to it was chosen from, in order."""
    rows: dict[tuple[int, ...], list[bytes]] = {}
    lock, advance = threading.Lock(), Request.advance

    def record(self: Request, logits: Any, likeliest: int, n_ctx: int) -> None:
        with lock:
            rows.setdefault(tuple(self.prompt.tolist()), []).append(logits.tobytes())
        advance(self, logits, likeliest, n_ctx)

    with patch.context() as inner:
        inner.setattr(Request, "advance", record)
        yield rows
