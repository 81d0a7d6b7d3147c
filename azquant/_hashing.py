"""SHA-256 of files, made by threads while something else is done.

Nothing heavy is imported here: a command can begin to hash what it will read (:func:`hashing_ahead`) and only
then import what the rest of its work needs.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from mmap import mmap
from pathlib import Path
from threading import Event

from azquant.errors import InputFileError

__all__ = ["file_hashes", "hashing", "hashing_ahead"]

_CHUNK = 1 << 20
"""Bytes at a time: few enough to stay in a cache until they are hashed, enough to wait for Python seldom."""
_AT_ONCE = 4

_Identity = tuple[int, int, int, int]
_ahead: dict[_Identity, Future[str]] = {}
"""What :func:`hashing_ahead` has begun, by what tells one state of a file from another."""


def file_hashes(files: Sequence[Path]) -> list[str]:
    """SHA-256 of each file in hexadecimal, several at a time. Raises InputFileError."""
    with hashing(files) as hashes:
        return hashes()


@contextmanager
def hashing(files: Sequence[Path]) -> Iterator[Callable[[], list[str]]]:
    """:func:`file_hashes` while something else is done: what is given waits for them.

    Leaving the ``with`` ends it.
    """
    with _threads() as begin:
        found = [_begun_ahead(path) or begin(path) for path in files]
        yield lambda: [future.result() for future in found]


@contextmanager
def hashing_ahead(files: Sequence[Path]) -> Iterator[None]:
    """Begin to hash ``files``, for a :func:`hashing` inside the ``with`` that asks for them.

    A file that is not there, or is no regular one, is nobody's error here.
    """
    with _threads() as begin:
        mine: dict[_Identity, Future[str]] = {}
        for path in files:
            identity = _identity(path)
            if identity is not None:
                mine[identity] = begin(path)
        _ahead.update(mine)
        try:
            yield
        finally:
            for identity in mine:
                _ahead.pop(identity, None)


@contextmanager
def _threads() -> Iterator[Callable[[Path], Future[str]]]:
    """What begins to hash a file; nothing of it is under way any more after the ``with``."""
    stop = Event()
    with ThreadPoolExecutor(_AT_ONCE, "azquant-hash") as pool:
        try:
            yield lambda path: pool.submit(_file_hash, path, stop)
        finally:
            stop.set()


def _begun_ahead(path: Path) -> Future[str] | None:
    identity = _identity(path)
    return None if identity is None else _ahead.get(identity)


def _identity(path: Path) -> _Identity | None:
    with suppress(OSError, ValueError):
        found = path.stat()
        if stat.S_ISREG(found.st_mode):
            return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
    return None


def _file_hash(path: Path, stop: Event) -> str:
    digest = hashlib.sha256()
    try:
        # Memory of a mapping is made when it is filled, and not, as a bytearray's, before the others go on.
        with path.open("rb", buffering=0) as file, mmap(-1, _CHUNK) as memory, memoryview(memory) as chunk:
            while not stop.is_set() and (size := file.readinto(chunk)):
                digest.update(chunk[:size])
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read: {error}") from error
    return digest.hexdigest()
