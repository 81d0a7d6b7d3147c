"""How much memory a model takes, and how much this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from azquant.errors import OutOfMemoryError
from azquant.program import ProgramSpec

__all__ = ["MemoryNeeds", "available_memory", "cache_bytes", "memory_limit"]

_KV_TILE = 16  # positions of the C cache come in whole tiles


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes that running a model takes, beside the program itself."""

    weights: int
    """The packed copies; of what is not packed, the file's own pages."""
    cache_per_sequence: int
    """Keys and values of ``n_ctx`` positions. They take memory as positions are used."""
    n_seq: int
    """Sequences that are computed at once, at most."""
    work: int
    """Buffers of the longest step."""

    @property
    def cache(self) -> int:
        """Bytes of the whole KV cache."""
        return self.cache_per_sequence * self.n_seq

    @property
    def total(self) -> int:
        """Everything, with every position of the cache in use."""
        return self.weights + self.cache + self.work

    def check(self, what: str, available: int, *, whole_cache: bool) -> None:
        """Raises OutOfMemoryError unless all of it is available, or all but the cache."""
        needed = self.total if whole_cache else self.weights + self.work
        if needed <= available:
            return
        raise OutOfMemoryError(
            f"{what}: running this model takes {_show(needed)}, {_show(available)} are available. Weights "
            f"{_show(self.weights)}, KV cache {_show(self.cache)} ({self.n_seq} sequences), buffers "
            f"{_show(self.work)}. "
            + ("Give a smaller n_ctx or n_seq, or " if whole_cache else "Please ")
            + "end other programs, or use a smaller type of weights"
        )


def _show(size: int) -> str:
    return f"{size:,} bytes" if size < 10 << 20 else f"{size / (1 << 20):,.0f} MiB"


def cache_bytes(spec: ProgramSpec[Any], n_ctx: int, kv_type: str) -> int:
    """Bytes of the keys and values of one sequence of ``n_ctx`` positions."""
    row = {"f32": 4 * spec.head_dim, "f16": 2 * spec.head_dim, "q8_0": 34 * -(-spec.head_dim // 32)}[kv_type]
    return 2 * spec.n_layer * spec.n_head_kv * -(-n_ctx // _KV_TILE) * _KV_TILE * row


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


def available_memory(
    cgroup_root: str | os.PathLike[str] = "/sys/fs/cgroup", proc: str | os.PathLike[str] = "/proc"
) -> int:
    """Bytes that could be taken now: what the kernel calls available, with free swap, and what every control
    group of this process (v1 and v2) leaves. Pages of files that can be dropped count as free.
    """
    limit = memory_limit(cgroup_root)
    try:
        lines = (Path(proc) / "meminfo").read_text().splitlines()
        sizes = {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":", 1) for line in lines)}
        limit = min(limit, sizes["MemAvailable"] + sizes.get("SwapFree", 0))
    except (OSError, ValueError, KeyError, IndexError):  # another system
        pass
    return min([limit, *_left_by_groups(Path(cgroup_root), Path(proc))])


def _left_by_groups(root: Path, proc: Path) -> Iterator[int]:
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            if (left := _left(group, *names)) is not None:
                yield left
            if group == base:
                break


def _left(group: Path, limit: str, used: str, droppable: str) -> int | None:
    """What a control group leaves; ``None`` where it sets no limit or is not seen from here."""
    try:
        most = int((group / limit).read_text())
        taken = int((group / used).read_text())
        stat = (group / "memory.stat").read_text().splitlines()
        dropped = next((int(line.split()[1]) for line in stat if line.startswith(f"{droppable} ")), 0)
    except (OSError, ValueError, IndexError):
        return None
    return max(0, most - max(0, taken - dropped))
