"""The places of a KV cache, and what of a prompt they hold already."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from azquant.program import zeros

__all__ = ["Slot", "Slots"]


@dataclass
class Slot:
    """One sequence of the cache: the tokens whose keys and values stand at its positions 0 .. length - 1."""

    index: int
    tokens: array[int]
    length: int = 0
    busy: bool = False
    last_used: int = field(default=0)

    def extend(self, tokens: array[int]) -> None:
        """Notes tokens that were computed at the next positions."""
        memoryview(self.tokens)[self.length : self.length + len(tokens)] = memoryview(tokens)
        self.length += len(tokens)

    def append(self, token: int) -> None:
        """Notes one token that was computed at the next position."""
        self.tokens[self.length] = token
        self.length += 1

    def common(self, prompt: array[int]) -> int:
        """How many tokens at its start ``prompt`` shares with this slot."""
        ours, theirs = memoryview(self.tokens), memoryview(prompt)
        same, other = (
            0,
            min(self.length, len(prompt)) + 1,
        )  # so many are equal, so many are not or are not there
        while other - same > 1:
            middle = (same + other) // 2
            if ours[same:middle] == theirs[same:middle]:
                same = middle
            else:
                other = middle
        return same


class Slots:
    """Hands out slots so that as much of a prompt as possible need not be computed again.

    ``copy(source, target, n)`` copies the first n positions of one sequence of the cache into another.
    """

    def __init__(self, n_seq: int, n_ctx: int, copy: Callable[[int, int, int], None]) -> None:
        self._slots = [Slot(i, zeros(n_ctx)) for i in range(n_seq)]
        self._copy = copy
        self._clock = 0

    def free(self) -> int:
        """Slots that nobody uses."""
        return sum(not slot.busy for slot in self._slots)

    def take(self, prompt: array[int]) -> Slot:
        """A free slot, its length set to what it holds of ``prompt``, all but the last token at most.

        The longest common start with any slot counts, busy ones too: what they hold only grows. A free slot
        that shares at least half of what it holds is used in place; else the start is copied into the slot
        that was given back longest ago, so that one short common start does not cost another conversation.
        """
        wanted = prompt[:-1]
        idle = [slot for slot in self._slots if not slot.busy]
        best = max(self._slots, key=lambda slot: (slot.common(wanted), not slot.busy, -slot.index))
        shared = best.common(wanted)
        if not best.busy and shared and 2 * shared >= best.length:
            slot = best
        else:
            slot = min(idle, key=lambda slot: (slot.length > 0, slot.last_used, slot.index))
            if slot is not best and shared:
                slot.length = 0
                self._copy(best.index, slot.index, shared)
                memoryview(slot.tokens)[:shared] = memoryview(wanted)[:shared]
        slot.length = shared
        slot.busy = True
        return slot

    def give_back(self, slot: Slot) -> None:
        """Frees a slot; what it holds stays for a later prompt."""
        self._clock += 1
        slot.last_used = self._clock
        slot.busy = False
