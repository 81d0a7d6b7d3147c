#!/usr/bin/env python3
"""Train a tiny Azerbaijani language model on a CPU and save it as a Hugging Face checkpoint.

    python train_az_llm.py TEXT [TEXT ...] --out az_llm_tiny

The script goes the whole way from plain text to a checkpoint folder, one function a station:

    texts --read_texts--> train / held-out text --train_tokenizer--> byte-level BPE
          --encode--> token ids --train--> GPT-2 weights --save--> config.json, model.safetensors, tokenizer.json, ...

The defaults make a model of about one million parameters, small enough to train in minutes on one core. It
learns the sounds, endings and common words of the language; half a megabyte of text is far too little to learn
sense. `azquant convert OUT model.gguf --type q4_0` turns the folder into a 4-bit GGUF file.

Needs: torch, transformers, tokenizers.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"  # stands between documents, and is GPT-2's one special token
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


# 1. Text ------------------------------------------------------------------------------------------------------


def read_texts(paths: Sequence[Path], held_out: float) -> tuple[list[str], list[str]]:
    """Read UTF-8 files and cut each into a training part and its last `held_out` fraction.

    The tail of *every* file is held out, not the tail of the last one, so that both parts hold the same mixture
    of texts. The cut falls on a line break.

    Returns:
        (training parts, held-out parts), one of each per file.

    Raises:
        ValueError: a file is not UTF-8, or too short to be cut in two.
    """
    training, held = [], []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from error
        cut = text.find("\n", int(len(text) * (1 - held_out)))
        if cut <= 0:
            raise ValueError(f"{path}: no line break in the last {held_out:.0%}, so no text can be held out")
        training.append(text[:cut].strip())
        held.append(text[cut:].strip())
    return training, held


# 2. Tokenizer -------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer, GPT-2's kind: any text can be encoded, because any byte can.

    The pre-tokenizer cuts the text into words with GPT-2's regular expression (`use_regex=True`); merges never
    cross these cuts. The 256 byte symbols are always in the vocabulary, seen in the text or not.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Encode texts into one stream of token ids (1-D int64); a blank line in a text begins a new document."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [end]
    for text in texts:
        for document in text.split("\n\n"):
            if document.strip():
                ids += [*tokenizer.encode(document.strip()).ids, end]
    return torch.tensor(ids)


# 3. Model -----------------------------------------------------------------------------------------------------


def build_model(tokenizer: Tokenizer, arguments: argparse.Namespace) -> GPT2LMHeadModel:
    """Make a GPT-2 with random weights; the output head shares the token embedding's weights."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=arguments.context,
        n_embd=arguments.n_embd,
        n_layer=arguments.n_layer,
        n_head=arguments.n_head,
        resid_pdrop=arguments.dropout,
        embd_pdrop=arguments.dropout,
        attn_pdrop=arguments.dropout,
        # Left alone, these would be 50256, GPT-2's own id, which this vocabulary does not have.
        bos_token_id=end,
        eos_token_id=end,
        tie_word_embeddings=True,
    )
    return GPT2LMHeadModel(config)


def make_optimizer(model: GPT2LMHeadModel, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; only matrices are decayed: pulling biases and norms towards zero helps nothing."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99))


def learning_rate(done: float, peak: float, warmup: float = 0.04) -> float:
    """The rate when the fraction `done` of the run is over: a short rise, then a cosine down to 2% of the peak."""
    if done < warmup:
        return peak * (0.02 + 0.98 * done / warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warmup) / (1 - warmup))))
    return peak * (0.02 + 0.98 * cosine)


def cross_entropy(model: GPT2LMHeadModel, windows: torch.Tensor, inputs=None) -> torch.Tensor:
    """Mean loss (nats a token) of predicting windows[:, 1:] from windows[:, :-1]; windows is (batch, length)."""
    logits = model(windows[:, :-1] if inputs is None else inputs, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
