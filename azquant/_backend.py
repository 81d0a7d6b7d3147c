"""Chooses between the C kernels and NumPy, once, on first use."""

from __future__ import annotations

import os
import sys
import warnings
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from azquant.errors import ArgumentError, BackendWarning

__all__ = ["kernels"]

_SOURCE = Path(__file__).resolve().parent.parent


def _why_not_built(error: ImportError) -> str:
    """What to say, and what to do about it."""
    if (_SOURCE / "csrc").is_dir() and (_SOURCE / "setup.py").is_file():
        return (
            f"Python found azquant's source tree {_SOURCE}, where the C kernels are not built: run from "
            f"another folder, or build them there with: pip install --editable {_SOURCE}"
        )
    return (
        f"the C kernels are not built ({error}): install a C compiler, then azquant anew, with pip's options "
        "--force-reinstall --no-cache-dir"
    )


def _level_of_caller() -> int:
    """The stacklevel of the code that called into azquant, counted from this function's caller."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "azquant":
        frame, level = frame.f_back, level + 1
    return level


def _choose() -> tuple[ModuleType, str | None]:
    """The backend, and why it is not the C one."""
    wanted = os.environ.get("AZQUANT_BACKEND", "")
    if wanted not in ("", "c", "numpy"):
        raise ArgumentError(f"AZQUANT_BACKEND={wanted!r}: must be 'c' or 'numpy'")
    if wanted != "numpy":
        try:
            _native = import_module("azquant._native")
        except ImportError as error:
            if wanted == "c":
                raise
            reason = _why_not_built(error)
        except AttributeError as error:  # cffi's, of a name that the library does not have
            if wanted == "c":
                raise
            reason = (
                f"the C kernels were built from other sources than this Python ({error}): build them anew "
                f"with pip install --editable {_SOURCE}"
            )
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
        warnings.warn(f"azquant runs on NumPy: {reason}", BackendWarning, stacklevel=_level_of_caller())
    return module
