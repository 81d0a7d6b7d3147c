"""Chooses between the C kernels and NumPy, once, on first use."""

from __future__ import annotations

import os
import warnings
from functools import cache
from types import ModuleType

from azquant.errors import ArgumentError, BackendWarning

__all__ = ["kernels"]


def _choose() -> tuple[ModuleType, str | None]:
    """The backend, and why it is not the C one."""
    wanted = os.environ.get("AZQUANT_BACKEND", "")
    if wanted not in ("", "c", "numpy"):
        raise ArgumentError(f"AZQUANT_BACKEND={wanted!r}: must be 'c' or 'numpy'")
    if wanted != "numpy":
        try:
            from azquant import _native
        except ImportError as error:
            if wanted == "c":
                raise
            reason = f"the C kernels are not built ({error}); reinstall with a C compiler for speed"
        else:
            return _native, None
    else:
        reason = "AZQUANT_BACKEND=numpy"
    from azquant import _fallback

    return _fallback, reason


@cache
def kernels() -> ModuleType:
    """``azquant._native`` or ``azquant._fallback``. Warns once when it is the latter."""
    module, reason = _choose()
    if reason is not None:
        warnings.warn(f"azquant runs on NumPy: {reason}", BackendWarning, stacklevel=2)
    return module
