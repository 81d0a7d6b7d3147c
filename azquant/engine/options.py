"""What a caller may ask of one answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from azquant.engine.sampling import Sampler, check_count
from azquant.errors import ArgumentError

__all__ = ["GenerateOptions", "Options", "check_stops"]

_MOST_STOPS = 64
_MOST_LOGPROBS = 1000


class GenerateOptions(TypedDict, total=False):
    """The keywords of ``generate``, ``stream``, ``submit`` and ``chat``; see :class:`Options`."""

    max_tokens: int
    stop: str | Sequence[str]
    stop_tokens: Sequence[int]
    logprobs: int | None
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[int, float] | None


@dataclass(frozen=True)
class Options(Sampler):
    """A :class:`Sampler`, and when to stop.

    An answer ends at the model's end token, at one of ``stop_tokens`` (neither becomes part of it), where the
    text first shows one of the ``stop`` strings (the text ends before it), after ``max_tokens`` tokens, or
    where the context is full. ``logprobs`` n keeps for each token its log-probability and those of the n
    likeliest, of the model's own distribution: before steps 1 to 8.
    """

    max_tokens: int = 64
    stop: str | Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.max_tokens, "max_tokens")
        check_stops(self.stop)
        tokens = self.stop_tokens
        if isinstance(tokens, (str, bytes)) or not hasattr(tokens, "__iter__"):
            raise ArgumentError(f"stop_tokens must be a list of token ids, not {tokens!r}")
        for token in tokens:
            check_count(token, "a token id of stop_tokens")
        if self.logprobs is not None:
            check_count(self.logprobs, "logprobs", 0, _MOST_LOGPROBS)


def check_stops(stop: Any) -> tuple[str, ...]:
    """``stop`` as a tuple of strings. Raises ArgumentError unless it is a str or a list, none empty."""
    strings = (stop,) if isinstance(stop, str) else stop
    if isinstance(strings, bytes) or not isinstance(strings, Sequence):
        raise ArgumentError(f"stop must be a string or a list of strings, not {type(stop).__name__}")
    if len(strings) > _MOST_STOPS:
        raise ArgumentError(f"{len(strings)} stop strings given; {_MOST_STOPS} are the most")
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ArgumentError(f"a stop string must be a string that is not empty, not {string!r}")
        if any("\ud800" <= char <= "\udfff" for char in string):
            raise ArgumentError(f"the stop string {string!r} has a lone surrogate: no text ever shows it")
    return tuple(strings)
