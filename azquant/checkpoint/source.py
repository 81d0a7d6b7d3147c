"""Positioned reads from one checkpoint file.

A descriptor and ``pread`` instead of a mapping: bytes that were converted and dropped do not stay in the
process's resident set, and a file cut short while it is read gives an error instead of SIGBUS.
"""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

from azquant.errors import CheckpointError, InputFileError

__all__ = ["FileSource"]

# Linux moves at most 0x7ffff000 bytes a call; smaller pieces also keep Ctrl-C responsive.
_MAX_READ = 1 << 28


class FileSource:
    """A regular file open for reading. Any thread may read at any time.

    Raises InputFileError when ``path`` is missing, is no regular file (a FIFO would block for ever) or cannot
    be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise InputFileError(f"{path}: not a regular file")
            self._file = path.open("rb", buffering=0)
        except InputFileError:
            raise
        except FileNotFoundError as e:
            raise InputFileError(f"{path}: no such file") from e
        except (OSError, ValueError) as e:  # ValueError: a NUL byte in the path
            raise InputFileError(f"{path}: cannot be opened: {e}") from e
        self._lock = threading.Lock()
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``. Raises CheckpointError when the file is shorter than that."""
        out = bytearray(self._checked(offset, size))
        self.read_into(offset, memoryview(out))
        return bytes(out)

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill the byte buffer ``out`` from ``offset``. Raises CheckpointError when the file is too short."""
        self._checked(offset, out.nbytes)
        done = 0
        while done < out.nbytes:
            try:
                got = self._pread(offset + done, out[done : done + _MAX_READ])
            except (OSError, ValueError) as e:  # ValueError: the file was closed
                raise InputFileError(f"{self.path}: cannot be read: {e}") from e
            if got == 0:
                raise CheckpointError(
                    "the file was cut short while being read", path=self.path, offset=offset + done
                )
            done += got

    def close(self) -> None:
        """Close the descriptor. Reading afterwards raises InputFileError; closing twice is allowed."""
        self._file.close()

    def _checked(self, offset: int, size: int) -> int:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise CheckpointError(
                f"{size} bytes are needed here, the file ends at byte {self.size}: it is truncated",
                path=self.path,
                offset=offset,
            )
        return size

    def _pread(self, offset: int, out: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [out], offset)
        with self._lock:  # Windows has no positioned read
            self._file.seek(offset)
            return self._file.readinto(out) or 0
