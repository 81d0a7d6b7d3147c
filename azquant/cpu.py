"""Which instruction set and how many threads the kernels use."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

from azquant._backend import kernels
from azquant.errors import ArgumentError, UnsupportedTypeError
from azquant.types import GGMLType, get_type

__all__ = [
    "COMPUTE_MODES",
    "Choice",
    "active_isa",
    "backend",
    "choice",
    "default_threads",
    "isas",
    "num_threads",
    "refusals",
    "set_num_threads",
    "use_isa",
]

COMPUTE_MODES = ("auto", "int8", "bf16", "fp32")
"""What ``compute=`` takes everywhere."""


class Choice(NamedTuple):
    """How a product is computed."""

    compute: str
    """``"int8"``, ``"bf16"`` or ``"fp32"``."""
    isa: str
    """That of the kernel that multiplies: the active one, or the best below it that has one."""


def backend() -> str:
    """``"c"`` or ``"numpy"``: what runs the kernels."""
    name: str = kernels().NAME
    return name


def isas() -> list[str]:
    """The instruction sets that azquant has kernels for and this machine can run, plainest first.

    The words are the same everywhere: ``scalar avx2 ...``. Empty on the NumPy backend.
    """
    return [name for name, usable in kernels().isas() if usable]


def refusals() -> dict[str, str]:
    """Why an instruction set cannot be used, for each of those that azquant has kernels for and this machine
    cannot run.

    AMX must be granted by the operating system and is tried on a few tiles before it is used.
    """
    reasons: dict[str, str] = kernels().refusals()
    return reasons


def choice(m: int, n: int, k: int, type: str | GGMLType = "q4_0", compute: str = "auto") -> Choice:
    """How ``matmul`` multiplies ``m`` rows of ``k`` numbers by weights ``(n, k)`` of a type.

    ``compute="auto"`` takes int8, where the type has int8 kernels, else fp32. With AMX it takes bf16 from
    some rows on (not for f32 and f16 weights), with AVX512-BF16 for bf16 weights. The number of rows is each
    type's own.

    Raises ArgumentError (an unknown mode, a negative size), UnsupportedTypeError (an unknown type, or one
    without a kernel for ``compute``), ShapeError (k no whole number of blocks).

    >>> azquant.cpu.choice(512, 4096, 4096)
    Choice(compute='int8', isa='avx512vnni')
    """
    if compute not in COMPUTE_MODES:
        raise ArgumentError(f"compute={compute!r}: must be one of {', '.join(COMPUTE_MODES)}")
    if min(m, n, k) < 0:
        raise ArgumentError(f"a product of {m} rows by weights ({n}, {k}): sizes cannot be negative")
    found = get_type(type)
    if not found.can_dequantize:
        raise UnsupportedTypeError(f"{found} weights cannot be computed with yet")
    found.row_bytes(k)
    _prepare()
    return Choice(*kernels().choice(found.id, m, n, k, compute))


def active_isa() -> str:
    """The instruction set in use (``"numpy"`` on the NumPy backend)."""
    _prepare()
    name: str = kernels().active_isa()
    return name


def use_isa(name: str) -> None:
    """Makes every later call use the kernels of ``name``; the environment variable AZQUANT_ISA does the same
    at start.

    Not to be called while other threads compute. Raises ArgumentError for a name that is unknown or that this
    machine cannot run.
    """
    _prepare()  # now, so that AZQUANT_ISA does not overrule this choice later
    _use_isa(name)


def _use_isa(name: str) -> None:
    if name not in isas():
        reason = refusals().get(name)
        why = f"is not usable on this machine: {reason}" if reason else "is unknown"
        raise ArgumentError(f"ISA {name!r} {why}; usable are: {', '.join(isas()) or 'none (NumPy backend)'}")
    kernels().use_isa(name)


def _cgroup_quota(root: Path) -> float | None:
    """Processors that the control group grants (v2, then v1); None when it sets no limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        pass
    try:
        quota_us = int((root / "cpu" / "cpu.cfs_quota_us").read_text())
        period_us = int((root / "cpu" / "cpu.cfs_period_us").read_text())
        return quota_us / period_us if quota_us > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def default_threads(cgroup_root: str | os.PathLike[str] = "/sys/fs/cgroup") -> int:
    """Threads to use when nobody says: the processors this process may run on, within its cgroup's quota."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        allowed = os.cpu_count() or 1
    quota = _cgroup_quota(Path(cgroup_root))
    if quota is not None:
        allowed = min(allowed, max(1, int(quota)))
    return max(1, allowed)


@cache
def _prepare() -> None:
    """Applies AZQUANT_ISA, AZQUANT_THREADS and the default thread count, once, before the first work."""
    wanted = os.environ.get("AZQUANT_THREADS")
    try:
        n = default_threads() if not wanted else int(wanted)
    except ValueError:
        raise ArgumentError(f"AZQUANT_THREADS={wanted!r}: must be a whole number") from None
    if n < 1:
        raise ArgumentError(f"AZQUANT_THREADS={wanted!r}: must be at least 1")
    kernels().set_threads(n)
    isa = os.environ.get("AZQUANT_ISA")
    if isa and kernels().NAME != "numpy":
        _use_isa(isa)


def num_threads() -> int:
    """Threads that each call uses, the calling one included."""
    _prepare()
    n: int = kernels().threads()
    return n


def set_num_threads(n: int) -> None:
    """Sets the threads that each call uses. Raises ArgumentError unless ``n`` is a whole number >= 1."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ArgumentError(f"number of threads must be a whole number >= 1, not {n!r}")
    _prepare()
    kernels().set_threads(n)
