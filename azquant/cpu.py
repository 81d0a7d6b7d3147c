"""Which instruction set and how many threads the kernels use."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from azquant._backend import kernels
from azquant.errors import ArgumentError

__all__ = ["active_isa", "backend", "default_threads", "isas", "num_threads", "set_num_threads", "use_isa"]


def backend() -> str:
    """``"c"`` or ``"numpy"``: what runs the kernels."""
    name: str = kernels().NAME
    return name


def isas() -> list[str]:
    """The instruction sets that azquant has kernels for and this machine can run, plainest first.

    The words are the same everywhere: ``scalar avx2 ...``. Empty on the NumPy backend.
    """
    return [name for name, usable in kernels().isas() if usable]


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
        known = [isa for isa, _ in kernels().isas()]
        why = "is not usable on this machine" if name in known else "is unknown"
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
