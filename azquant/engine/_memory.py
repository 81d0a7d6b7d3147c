"""How much memory this process may use."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["memory_limit"]


def memory_limit(cgroup_root: str | os.PathLike[str] = "/sys/fs/cgroup") -> int:
    """Bytes of memory that the machine has, or the control group (v2, then v1) grants if that is less."""
    try:
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on every system
        limit = 8 << 30
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            return min(limit, int((Path(cgroup_root) / name).read_text()))
        except (OSError, ValueError):
            continue
    return limit
