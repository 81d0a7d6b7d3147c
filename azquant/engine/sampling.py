"""Choosing the next token from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from azquant.errors import ArgumentError

__all__ = ["Sampler", "check_count"]

Logits = npt.NDArray[np.float32]


def check_count(value: Any, name: str, low: int = 0) -> int:
    """``value`` as a whole number >= low. Raises ArgumentError naming it."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
        raise ArgumentError(f"{name} must be a whole number >= {low}, not {value!r}")
    return int(value)


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen, in this order: temperature, then top_k, then top_p, then a draw.

    ``temperature`` 0 takes the most likely token (the lowest id among equals). ``top_k`` 0 and ``top_p`` 1
    keep all tokens. Equal seeds give equal draws; ``seed=None`` draws anew each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.temperature, (int, float)) and 0 <= self.temperature < math.inf):
            raise ArgumentError(f"temperature must be a finite number >= 0, not {self.temperature!r}")
        if not (isinstance(self.top_p, (int, float)) and 0 < self.top_p <= 1):
            raise ArgumentError(f"top_p must be a number above 0 and at most 1, not {self.top_p!r}")
        check_count(self.top_k, "top_k")
        if self.seed is not None:
            check_count(self.seed, "seed")

    def generator(self, sequence: int = 0) -> np.random.Generator:
        """The source of draws of one sequence of a batch: it does not depend on the others."""
        return np.random.default_rng(None if self.seed is None else [self.seed, sequence])

    def choose(self, logits: Logits, generator: np.random.Generator) -> int:
        """The next token's id from logits (vocab,)."""
        if self.temperature == 0:
            return int(np.argmax(logits))
        scaled = logits.astype(np.float64) / self.temperature
        order = np.argsort(-scaled, kind="stable")
        if self.top_k:
            order = order[: self.top_k]
        weights = np.exp(scaled[order] - scaled[order[0]])
        weights /= weights.sum()
        if self.top_p < 1:
            kept = int(np.searchsorted(np.cumsum(weights), self.top_p)) + 1
            order, weights = order[:kept], weights[:kept] / weights[:kept].sum()
        return int(generator.choice(order, p=weights))
