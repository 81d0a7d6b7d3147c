"""Choosing the next token from logits."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from azquant._lazy import np
from azquant.errors import ArgumentError, ModelError

__all__ = ["Chooser", "Sampler", "check_count", "check_number", "check_top", "log_softmax"]

if TYPE_CHECKING:
    import numpy.typing as npt

    Logits: TypeAlias = npt.NDArray[np.float32]
    Doubles: TypeAlias = npt.NDArray[np.float64]
    Ids: TypeAlias = npt.NDArray[np.intp]

_MOST_SEED = (1 << 128) - 1


def check_count(value: Any, name: str, low: int = 0, high: int | None = None) -> int:
    """``value`` as a whole number from ``low`` to ``high``. Raises ArgumentError naming it."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or int(value) < low or (high is not None and int(value) > high):
        limits = f">= {low}" if high is None else f"from {low} to {high}"
        raise ArgumentError(f"{name} must be a whole number {limits}, not {value!r}")
    return int(value)


def check_number(value: Any, name: str, low: float, high: float = math.inf) -> float:
    """``value`` as a finite number from ``low`` to ``high``. Raises ArgumentError naming it."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        number = float(value) if real else math.nan
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and low <= number <= high):
        limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f">= {low:g}"
        limits = limits if math.isfinite(low) else ""
        raise ArgumentError(f"{name} must be a finite number {limits}".rstrip() + f", not {value!r}")
    return number


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen. The steps, in this order; each default leaves its step out:

    1. ``logit_bias``: added to the logits of the token ids it names; ``-inf`` forbids a token.
    2. ``repetition_penalty``: the logits of all tokens in the prompt or the answer so far are divided by it
       where positive and multiplied by it where negative (as in CTRL, arXiv 1909.05858, and transformers).
    3. ``frequency_penalty`` times how often a token stands in the answer so far, and ``presence_penalty`` if
       it does at all, are subtracted (as in OpenAI's API).
    4. ``temperature`` divides the logits. 0 ends here: the likeliest token, of equals the lowest id.
    5. ``top_k``: only the k likeliest stay (0: all; of equals the lowest ids).
    6. ``top_p``: only the likeliest stay that together reach this share of what step 5 left.
    7. ``min_p``: only those stay that are at least this share as likely as the likeliest.
    8. A draw. Equal seeds give equal draws; ``seed=None`` draws anew each time.

    Raises ArgumentError for values that are no numbers or outside their range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        check_number(self.temperature, "temperature", 0)
        check_count(self.top_k, "top_k")
        if check_number(self.top_p, "top_p", 0, 1) == 0:
            raise ArgumentError("top_p must be above 0: it is the share of the probability that is kept")
        if self.seed is not None:
            check_count(self.seed, "seed", 0, _MOST_SEED)
        check_number(self.min_p, "min_p", 0, 1)
        if check_number(self.repetition_penalty, "repetition_penalty", 0) == 0:
            raise ArgumentError("repetition_penalty must be above 0; 1 leaves it out")
        check_number(self.frequency_penalty, "frequency_penalty", -math.inf)
        check_number(self.presence_penalty, "presence_penalty", -math.inf)
        if self.logit_bias is not None:
            _check_bias(self.logit_bias)

    def chooser(self, n_vocab: int, prompt: Iterable[int] = ()) -> Chooser:
        """What chooses the tokens of one answer to ``prompt``. Raises ArgumentError for ids >= n_vocab."""
        return Chooser(self, n_vocab, prompt)


def _check_bias(bias: Any) -> None:
    if not isinstance(bias, Mapping):
        raise ArgumentError(f"logit_bias must map token ids to numbers, not be a {type(bias).__name__}")
    for token, value in bias.items():
        check_count(token, "a token id of logit_bias")
        if not (isinstance(value, numbers.Real) and float(value) == -math.inf):
            check_number(value, f"logit_bias[{token}]", -math.inf)


def log_softmax(logits: npt.NDArray[Any]) -> Doubles:
    """The logarithms of the probabilities, in float64, over the last axis."""
    x = np.asarray(logits, dtype=np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    shifted: Doubles = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return shifted


@dataclass
class Chooser:
    """A :class:`Sampler` at work on one answer: it remembers the tokens so far and its place in the draws."""

    sampler: Sampler
    n_vocab: int
    prompt: Iterable[int] = ()
    _random: np.random.Generator | None = field(init=False, default=None)
    _seen: npt.NDArray[np.bool_] | None = field(init=False, default=None)
    _counts: npt.NDArray[np.int64] | None = field(init=False, default=None)
    _bias: tuple[Ids, Doubles] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        s = self.sampler
        if s.temperature > 0:  # NumPy imports its generators when they are asked for
            self._random = np.random.default_rng(s.seed)
        if s.logit_bias:
            ids = np.array([int(token) for token in s.logit_bias], dtype=object)
            if ids.max() >= self.n_vocab:
                raise ArgumentError(f"logit_bias names token {ids.max()}; ids end at {self.n_vocab - 1}")
            self._bias = ids.astype(np.intp), np.array(list(s.logit_bias.values()), dtype=np.float64)
        if s.repetition_penalty != 1:
            self._seen = np.zeros(self.n_vocab, dtype=bool)
            self._seen[np.asarray(list(self.prompt), dtype=np.intp)] = True
        if s.frequency_penalty or s.presence_penalty:
            self._counts = np.zeros(self.n_vocab, dtype=np.int64)
        self.prompt = ()

    @property
    def takes_likeliest(self) -> bool:
        """Whether steps 1 to 8 come to this: the likeliest token, of equals the lowest id."""
        adjusts = self._bias is not None or self._seen is not None or self._counts is not None
        return self.sampler.temperature == 0 and not adjusts

    def choose(self, logits: Logits) -> int:
        """The next token's id from logits (n_vocab,), which are not changed.

        Raises ModelError for logits with NaN, ArgumentError when ``logit_bias`` forbids every token.
        """
        with np.errstate(all="ignore"):  # extreme penalties and temperatures may overflow on purpose
            token = self._draw(self._adjust(logits))
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        return token

    def _adjust(self, logits: Logits) -> npt.NDArray[Any]:
        """Steps 1 to 3."""
        if self._bias is None and self._seen is None and self._counts is None:
            return logits
        s, x = self.sampler, logits.astype(np.float64)
        if self._bias is not None:
            ids, bias = self._bias
            x[ids] += bias
        if self._seen is not None:
            ids = np.flatnonzero(self._seen)
            x[ids] = np.where(x[ids] > 0, x[ids] / s.repetition_penalty, x[ids] * s.repetition_penalty)
        if self._counts is not None:
            ids = np.flatnonzero(self._counts)
            x[ids] -= s.frequency_penalty * self._counts[ids] + s.presence_penalty
        return x

    def _draw(self, x: npt.NDArray[Any]) -> int:
        """Steps 4 to 8."""
        s = self.sampler
        likeliest = int(np.argmax(x))  # of a NaN, should there be one
        top = check_top(float(x[likeliest]))
        if self._random is None:
            return likeliest
        ids: Ids | None = None  # None: all
        if 0 < s.top_k < len(x):
            ids = _largest(x, int(s.top_k))
            x = x[ids]
        weights = x.astype(np.float64)
        weights -= top
        weights /= float(s.temperature)
        np.exp(weights, out=weights)
        if s.top_p < 1:
            kept = _nucleus(weights, float(s.top_p))
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        if s.min_p > 0:
            kept = np.flatnonzero(weights >= float(s.min_p))  # the likeliest has weight 1
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        heights = np.cumsum(weights)
        at = int(np.searchsorted(heights, self._random.random() * heights[-1], side="right"))
        at = min(at, len(heights) - 1)
        return at if ids is None else int(ids[at])


def check_top(top: float) -> float:
    """The likeliest token's logit. Raises ModelError or ArgumentError where there is no likeliest."""
    if math.isnan(top) or top == math.inf:
        raise ModelError("the model gives logits that are not finite: its weights are damaged")
    if top == -math.inf:
        raise ArgumentError("no token is left to choose: logit_bias or a penalty forbids every one")
    return top


_COLUMN = 32


def _largest(x: npt.NDArray[Any], k: int) -> Ids:
    """Ids of the k largest, ascending; of equals the lowest ids."""
    columns = len(x) // _COLUMN
    ids: Ids | None = None
    if columns >= 2 * k:  # k columns reach the k-th largest of their tops: nothing below it counts
        tops = x[: columns * _COLUMN].reshape(_COLUMN, columns).max(axis=0)
        ids = np.flatnonzero(x >= np.partition(tops, columns - k)[columns - k])
        x = x[ids]
    least = np.partition(x, len(x) - k)[len(x) - k]
    above = np.flatnonzero(x > least)
    chosen = np.sort(np.concatenate([above, np.flatnonzero(x == least)[: k - len(above)]]))
    return chosen if ids is None else ids[chosen]


def _nucleus(weights: Doubles, share: float) -> Ids:
    """The fewest, likeliest first, that reach ``share`` of all weight."""
    p = weights / weights.sum()
    few = 128
    while few < len(p):  # most often they are among few: no need to sort them all
        order = _largest(p, few)
        order = order[np.argsort(-p[order], kind="stable")]
        heights = np.cumsum(p[order])
        if heights[-1] >= share:
            break
        few *= 8
    else:
        # All below (1 - share) / n together have less than 1 - share: they need no sorting.
        kept = np.flatnonzero(p >= (1 - share) / len(p))
        order = kept[np.argsort(-p[kept], kind="stable")]
        heights = np.cumsum(p[order])
    return order[: int(np.searchsorted(heights, share)) + 1]
