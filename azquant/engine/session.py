"""A KV cache with the sequences in it, and the steps that extend them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from azquant._backend import kernels
from azquant._lazy import np
from azquant.errors import ArgumentError, ContextLengthError
from azquant.program import ProgramSpec, StepArrays

if TYPE_CHECKING:
    from array import array

    import numpy.typing as npt

    Ints: TypeAlias = npt.NDArray[np.int32] | array[int]

__all__ = ["STEP_TOKENS", "Session"]

STEP_TOKENS = 256
"""Most tokens in one step: enough to fill the kernels, few enough that Ctrl-C is answered soon."""


class Session:
    """Sequences 0 .. n_seq - 1, each with a length that :meth:`feed` extends.

    Not to be used by two threads at once; sessions of one model are independent of each other.
    """

    def __init__(
        self, program: Any, spec: ProgramSpec[Any], compute: str, kv_type: str, n_seq: int, n_ctx: int
    ) -> None:
        if n_seq < 1 or n_ctx < 1:
            raise ArgumentError("a session needs at least one sequence and one position")
        self._program = program
        self._arrays = StepArrays(program.n_vocab)
        self._compute = compute
        self.ops = spec.ops
        self.kv = kernels().KVCache(spec.n_layer, n_seq, n_ctx, spec.n_head_kv, spec.head_dim, kv_type)
        self.lengths = [0] * n_seq

    @contextmanager
    def measured(self) -> Iterator[npt.NDArray[np.float64]]:
        """Seconds that each of ``ops`` took in the steps within the ``with`` block, filled in as they run.

        Steps of the same model that others make meanwhile count too.
        """
        seconds = np.zeros(len(self.ops))
        self._program.measure(seconds)
        try:
            yield seconds
        finally:
            self._program.measure(None)

    def reset(self) -> None:
        """Begins all sequences anew."""
        self.lengths = [0] * len(self.lengths)

    def feed(
        self, parts: Sequence[tuple[int, Ints]], *, every: bool = False, copy: bool = True
    ) -> npt.NDArray[np.float32]:
        """Appends tokens to sequences -> logits, one row a part (after its last token), in the parts' order.

        ``parts`` are (sequence, tokens) with at least one token each and no sequence twice. With ``every``
        the logits after every token come instead, in order. More than STEP_TOKENS tokens go in several steps.
        Without ``copy`` the result may be overwritten by the next call.

        Raises ContextLengthError before anything is computed when a sequence would outgrow the cache.
        """
        for sequence, tokens in parts:
            if self.lengths[sequence] + len(tokens) > self.kv.n_ctx:
                raise ContextLengthError(
                    f"sequence {sequence} has {self.lengths[sequence]} tokens; {len(tokens)} more do not fit "
                    f"into {self.kv.n_ctx} positions"
                )
        if not every and len(parts) <= STEP_TOKENS and all(len(part) == 1 for _, part in parts):
            logits = self._feed_one_each(parts)
            return np.array(logits) if copy else logits
        tokens = np.concatenate([part for _, part in parts])
        sequences = np.repeat([sequence for sequence, _ in parts], [len(part) for _, part in parts])
        positions = np.concatenate([self.lengths[s] + np.arange(len(part)) for s, part in parts])
        wanted = np.arange(len(tokens)) if every else np.cumsum([len(part) for _, part in parts]) - 1
        rows = []
        for at in range(0, len(tokens), STEP_TOKENS):
            stop = at + STEP_TOKENS
            here = wanted[(wanted >= at) & (wanted < stop)] - at
            step = (tokens[at:stop], sequences[at:stop], positions[at:stop], here)
            rows.append(self._program.step(self.kv, self._compute, *step))
        for sequence, part in parts:
            self.lengths[sequence] += len(part)
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def _feed_one_each(self, parts: Sequence[tuple[int, Ints]]) -> npt.NDArray[np.float32]:
        """The step of a decode, which should not take longer to prepare than to compute."""
        arrays, n = self._arrays, len(parts)
        arrays.reserve(n, n)
        for i, (sequence, part) in enumerate(parts):
            arrays.tokens[i] = part[0]
            arrays.sequence[i], arrays.position[i] = sequence, self.lengths[sequence]
            arrays.out_rows[i] = i
        self._program.run(self.kv, self._compute, arrays, n, n, choose=False)
        for sequence, _ in parts:
            self.lengths[sequence] += 1
        return arrays.logits[:n]
