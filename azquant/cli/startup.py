"""What a verb does first, to be quick."""

from __future__ import annotations

import os
import sys

__all__ = ["import_numpy"]

_SPIN = "OPENBLAS_THREAD_TIMEOUT"


def import_numpy() -> None:
    """Import NumPy with its BLAS's threads asleep until they are needed.

    OpenBLAS starts a thread for each processor, and each looks for work without pause for tens of
    milliseconds: for verbs that hardly multiply with NumPy it is time taken from their own threads. Where
    the environment says how long they shall wait, or NumPy is there already, nothing changes.
    """
    if "numpy" in sys.modules or _SPIN in os.environ:
        return
    os.environ[_SPIN] = "4"  # two to that power, in cycles: the least
    try:
        import numpy  # noqa: F401
    finally:
        del os.environ[_SPIN]  # for this process alone, not for those that it starts
