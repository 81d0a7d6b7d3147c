"""Cutting a text into windows, and the logits inside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from azquant.engine import Model
from azquant.engine.sampling import check_count
from azquant.engine.session import STEP_TOKENS
from azquant.errors import ArgumentError

__all__ = ["Windows", "cut", "text_tokens", "window_logits"]

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

DEFAULT_N_CTX = 512
"""llama-perplexity's."""


BAND = 4 << 20
"""Most logits at a time; the arithmetic on them takes some eight times their four bytes."""


@dataclass(frozen=True)
class Windows:
    """Windows (chunks, n_ctx) of token ids, each beginning with BOS where the model wants one there."""

    tokens: Ints
    n_tokens: int
    """Tokens of the whole text."""

    @property
    def n_ctx(self) -> int:
        """Tokens of a window."""
        return int(self.tokens.shape[1])

    @property
    def first(self) -> int:
        """The first position whose logits count: the tokens before it only give context."""
        return self.n_ctx // 2


def text_tokens(model: Model, text: str) -> Ints:
    """``text`` as llama-perplexity and llama-imatrix read it: BOS first where the model wants one, no EOS.

    Texts of special tokens in it are ordinary text. Raises TokenizerError.
    """
    tokenizer = model.tokenizer
    tokens = tokenizer.encode(text, add_special=False, parse_special=False)
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        tokens.insert(0, tokenizer.bos_id)
    return np.asarray(tokens, dtype=np.int32)


def cut(model: Model, tokens: Ints, n_ctx: int | None = None, chunks: int | None = None) -> Windows:
    """Cuts a text into windows that follow each other; a rest shorter than a window is left out.

    ``n_ctx`` is 512 unless given, and never more than the model has. ``chunks`` takes only the first windows.
    Raises ArgumentError, also for a text shorter than one window.
    """
    n_ctx = min(DEFAULT_N_CTX, model.context_length) if n_ctx is None else check_count(n_ctx, "n_ctx", 4)
    if n_ctx > model.context_length:
        raise ArgumentError(f"n_ctx is {n_ctx}, but the model has {model.context_length} positions")
    n = len(tokens) // n_ctx
    if chunks is not None:
        n = min(n, check_count(chunks, "chunks", 1))
    if n < 1:
        raise ArgumentError(
            f"the text has {len(tokens)} tokens, a window {n_ctx}; give a longer text or a smaller n_ctx"
        )
    windows = tokens[: n * n_ctx].reshape(n, n_ctx).copy()
    if model.tokenizer.add_bos and model.tokenizer.bos_id is not None:
        windows[:, 0] = model.tokenizer.bos_id  # in place of what stood there, as llama.cpp does it
    return Windows(windows, len(tokens))


def window_logits(model: Model, windows: Windows) -> Iterator[Iterator[Floats]]:
    """For each window the logits of positions ``first`` .. n_ctx - 2, in bands (rows, vocab)."""
    session = model.session(n_ctx=windows.n_ctx)
    step = max(1, min(STEP_TOKENS, BAND // model.n_vocab))
    for window in windows.tokens:
        session.lengths[0] = 0
        session.feed([(0, window[: windows.first])])
        rest = window[windows.first : -1]
        yield (session.feed([(0, rest[at : at + step])], every=True) for at in range(0, len(rest), step))
