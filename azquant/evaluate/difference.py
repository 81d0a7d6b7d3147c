"""How far quantized weights are from the original: sums over bands, so that memory stays small."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["ErrorSums", "TensorErrors"]

Floats = npt.NDArray[np.floating[Any]]


class TensorErrors(NamedTuple):
    """The difference between a tensor and its source."""

    rmse: float
    """Root of the mean squared difference."""
    max_error: float
    """The largest difference."""
    max_index: int
    """Where it is: flat, in C order. -1 where there is no difference."""
    snr_db: float
    """Power of the source over that of the difference, in dB; infinite where there is none."""


class ErrorSums:
    """Sums of squares in float64 over bands of two tensors, first to last."""

    def __init__(self) -> None:
        self._count = 0
        self._squares = 0.0
        self._signal = 0.0
        self._largest = 0.0
        self._index = -1
        self.not_finite = False

    def add(self, values: Floats, source: Floats) -> None:
        """Take in the next values of both, of one size."""
        with np.errstate(invalid="ignore", over="ignore"):  # a signalling NaN complains when it is cast
            wanted = source.reshape(-1).astype(np.float64)
            difference = np.abs(values.reshape(-1) - wanted)
            self._squares += float(np.dot(difference, difference))
            self._signal += float(np.dot(wanted, wanted))
        if difference.size:
            if not math.isfinite(self._squares) and not np.isfinite(difference).all():
                self.not_finite = True
            else:
                at = int(difference.argmax())
                if difference[at] > self._largest:
                    self._largest, self._index = float(difference[at]), self._count + at
        self._count += difference.size

    def result(self) -> TensorErrors | None:
        """What was found; ``None`` where a value was not finite, so that there is no number to give."""
        if self.not_finite:
            return None
        if not self._squares:
            snr = math.inf
        elif not self._signal:
            snr = -math.inf
        else:
            snr = 10 * (math.log10(self._signal) - math.log10(self._squares))
        return TensorErrors(math.sqrt(self._squares / max(1, self._count)), self._largest, self._index, snr)
