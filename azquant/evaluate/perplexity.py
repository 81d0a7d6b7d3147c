"""Perplexity of a model on a text, and how far its predictions are from another model's.

The windows are llama-perplexity's: the text in pieces of n_ctx tokens, each computed on its own, and only the
second half of each counted, where every token has at least n_ctx / 2 tokens before it. Perplexities and
divergences of the two programs can be compared digit by digit, up to arithmetic: llama-perplexity keeps the
base logits in 16 bits, azquant in full.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from azquant.conversion import convert
from azquant.engine import Model, load
from azquant.engine.sampling import log_softmax
from azquant.errors import ArgumentError
from azquant.evaluate.windows import Windows, cut, text_tokens, window_logits

__all__ = ["Divergence", "Perplexity", "evaluate"]

Doubles = npt.NDArray[np.float64]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text."""

    nll: Doubles = field(repr=False)
    """(chunks, counted positions): minus the natural logarithm of each true token's probability."""
    n_ctx: int
    first: int
    """The position in the window of the first logits counted."""
    n_tokens: int
    """Tokens of the whole text."""

    @property
    def perplexity(self) -> float:
        """exp(mean nll)."""
        return math.exp(self.nll.mean())

    @property
    def error(self) -> float:
        """The standard error of ``perplexity``, tokens taken as independent (llama-perplexity's +/-)."""
        return _standard_error(self.nll) * self.perplexity

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "perplexity": self.perplexity,
            "error": self.error,
            "nll": float(self.nll.mean()),
            "n_ctx": self.n_ctx,
            "chunks": len(self.nll),
            "tokens": self.n_tokens,
            "tokens_counted": self.nll.size,
        }


@dataclass(frozen=True)
class Divergence:
    """How far a model's predictions are from a base model's, over the same positions."""

    base: Perplexity
    kl: Doubles = field(repr=False)
    """(chunks, counted positions): KL(base || model) of the next token's distribution, in nats."""
    same_top: npt.NDArray[np.bool_] = field(repr=False)
    """Whether both find the same token likeliest."""
    p_change: Doubles = field(repr=False)
    """The model's probability of the true token minus the base's."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "base": self.base.as_dict(),
            "mean_kl": float(self.kl.mean()),
            "mean_kl_error": _standard_error(self.kl),
            "median_kl": float(np.median(self.kl)),
            "p99_kl": float(np.percentile(self.kl, 99)),
            "max_kl": float(self.kl.max()),
            "same_top": float(self.same_top.mean()),
            "rms_p_change": float(np.sqrt((self.p_change**2).mean())),
        }


def _standard_error(values: Doubles) -> float:
    return float(values.std() / math.sqrt(values.size - 1)) if values.size > 1 else math.nan


def evaluate(
    model: Model | str | PathLike[str],
    text: str,
    *,
    base: Model | str | PathLike[str] | None = None,
    n_ctx: int | None = None,
    chunks: int | None = None,
    progress: Progress | None = None,
) -> tuple[Perplexity, Divergence | None]:
    """The perplexity of ``model`` on ``text`` and, with a ``base``, the divergence from it.

    ``base`` is a model, a GGUF file, or the checkpoint folder that ``model`` was converted from (converted to
    F32 in a temporary file). ``n_ctx`` is 512 unless given or the model has fewer positions; ``chunks`` takes
    the first windows only. ``progress(done, total)`` is told the windows.

    Raises what :func:`azquant.load` and :func:`azquant.convert` raise, and ArgumentError for a text shorter
    than one window, or a base with another vocabulary or another reading of the text.
    """
    with ExitStack() as stack:
        model = _open(model, stack)
        tokens = text_tokens(model, text)
        windows = cut(model, tokens, n_ctx, chunks)
        other = None
        if base is not None:
            other = _open(base, stack)
            _check_same(model, other, text, tokens)
        return _measure(model, other, windows, progress)


def _open(model: Model | str | PathLike[str], stack: ExitStack) -> Model:
    if isinstance(model, Model):
        return model
    path = Path(model)
    if path.is_dir():
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="azquant-")))
        convert(path, folder / "f32.gguf", "f32")
        path = folder / "f32.gguf"
    return load(path)


def _check_same(model: Model, base: Model, text: str, tokens: npt.NDArray[np.int32]) -> None:
    if base.n_vocab != model.n_vocab:
        raise ArgumentError(
            f"the vocabularies differ ({model.n_vocab} and {base.n_vocab} tokens): these models cannot be "
            "compared"
        )
    if base.tokenizer.can_encode and not np.array_equal(text_tokens(base, text), tokens):
        raise ArgumentError("the two models cut the text into different tokens: they cannot be compared")


def _measure(
    model: Model, base: Model | None, windows: Windows, progress: Progress | None
) -> tuple[Perplexity, Divergence | None]:
    shape = len(windows.tokens), windows.n_ctx - 1 - windows.first
    nll, base_nll, kl = np.empty(shape), np.empty(shape), np.empty(shape)
    same_top = np.empty(shape, dtype=bool)
    ours = window_logits(model, windows)
    theirs = None if base is None else window_logits(base, windows)
    for chunk, window in enumerate(windows.tokens):
        true, at = window[windows.first + 1 :], 0
        their_bands = None if theirs is None else next(theirs)
        for band in next(ours):
            rows = np.arange(len(band))
            place, ids = (chunk, slice(at, at + len(band))), true[at : at + len(band)]
            at += len(band)
            q = log_softmax(band)
            nll[place] = -q[rows, ids]
            if their_bands is not None:
                p = log_softmax(next(their_bands))
                base_nll[place] = -p[rows, ids]
                kl[place] = (np.exp(p) * (p - q)).sum(axis=1)
                same_top[place] = p.argmax(axis=1) == q.argmax(axis=1)
        if progress is not None:
            progress(chunk + 1, len(windows.tokens))

    def result(values: Doubles) -> Perplexity:
        return Perplexity(values, windows.n_ctx, windows.first, windows.n_tokens)

    if base is None:
        return result(nll), None
    return result(nll), Divergence(result(base_nll), kl, same_top, np.exp(-nll) - np.exp(-base_nll))
