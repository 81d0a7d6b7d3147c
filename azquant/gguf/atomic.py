"""Files that appear at their place whole, or not at all.

The bytes go to a file without a name in the target's folder (Linux's O_TMPFILE): whatever ends the
process, a kill included, the kernel takes it away. Only when it is complete and on the disk does it get
its name. Elsewhere, a named temporary file does the same, except that a kill leaves it behind.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import threading
from collections.abc import Iterable
from contextlib import suppress
from os import PathLike
from pathlib import Path
from types import TracebackType

from azquant.errors import OutputError

__all__ = ["AtomicFile", "check_output"]

_COPY_BYTES = 1 << 20
_SEEKING = threading.Lock()


def check_output(
    path: str | PathLike[str], *, overwrite: bool = False, sources: Iterable[str | PathLike[str]] = ()
) -> Path:
    """Whether a file may be written at ``path``; the place where it will lie, symbolic links followed.

    Raises OutputError when the folder is missing, the place is taken (by a file, unless ``overwrite``; by
    anything else, always), or it is one of ``sources`` under whatever name. Cheap: call it before long work.
    """
    shown = Path(path)
    try:
        target = shown.resolve()
        old = _status(target)
        if old is None and not target.parent.is_dir():
            raise OutputError(f"{shown} cannot be written: there is no folder {target.parent}")
        same = [
            source for source in map(Path, sources) if old and source.exists() and source.samefile(target)
        ]
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links, before Python 3.13
        if isinstance(error, OutputError):
            raise
        raise _failed(shown, error) from error
    if old is None:
        return target
    if not stat.S_ISREG(old.st_mode):
        kind = "folder" if stat.S_ISDIR(old.st_mode) else "special file"
        raise OutputError(f"{shown} cannot be written: it is a {kind}")
    if same:
        raise OutputError(f"{shown} is the same file as the input {same[0]}; choose another output")
    if not overwrite:
        raise OutputError(f"{shown} already exists; remove it or ask to overwrite it")
    return target


class AtomicFile:
    """A file under way. Use it in a ``with``; unless :meth:`publish` was reached, nothing remains of it.

    ``size`` is how many bytes will be written: less free space is refused at once. Permissions follow the
    umask, or the file that is replaced. Every failure to write is an OutputError.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        size: int,
        *,
        overwrite: bool = False,
        sources: Iterable[str | PathLike[str]] = (),
    ) -> None:
        self.path = Path(path)
        self._overwrite = overwrite
        self._target = check_output(path, overwrite=overwrite, sources=sources)
        self._folder = self._target.parent
        self._temporary: Path | None = None
        self._end = 0
        try:
            free = shutil.disk_usage(self._folder).free
            if free < size:
                raise OutputError(
                    f"{self.path} needs {size} bytes; {self._folder} has {free} free: nothing was written"
                )
            self.descriptor = self._create()
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise _failed(self.path, error) from error

    def write(self, data: memoryview, at: int | None = None) -> None:
        """Write ``data`` (bytes, one-dimensional) at byte ``at``, or after all that came without a place.

        With a place, any thread may write at any time.
        """
        if at is None:
            at, self._end = self._end, self._end + len(data)
        try:
            while data:
                count = _pwrite(self.descriptor, data, at)
                data, at = data[count:], at + count
        except OSError as error:
            raise _failed(self.path, error) from error

    def sync(self) -> None:
        """Bring what was written to the disk, and have it read from there from now on."""
        try:
            os.fsync(self.descriptor)
        except OSError as error:
            raise _failed(self.path, error) from error
        if hasattr(os, "posix_fadvise"):
            # Otherwise reading back would compare memory with itself. (Direct reads would be in the way of
            # those who write meanwhile: they lock the file.)
            with suppress(OSError):
                os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def read_back(self, at: int, out: memoryview) -> int:
        """Fill ``out`` from byte ``at`` on; how many bytes the file had. Any thread may, at any time."""
        try:
            return _preadv(self.descriptor, out, at)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be read back: {error.strerror}") from error

    def publish(self) -> None:
        """Give the file its name, in one step."""
        try:
            if old := _status(self._target):
                os.fchmod(self.descriptor, old.st_mode & 0o777)
            if self._temporary is None:
                self._name()
            if self._temporary is not None:
                self._move(self._temporary)
                self._temporary = None
            self._sync_folder()
        except OSError as error:
            raise _failed(self.path, error) from error

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            os.close(self.descriptor)
        finally:
            if self._temporary is not None:
                self._temporary.unlink(missing_ok=True)

    def _create(self) -> int:
        if hasattr(os, "O_TMPFILE") and Path("/proc/self/fd").is_dir():
            try:
                return os.open(self._folder, os.O_TMPFILE | os.O_RDWR, 0o666)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
                    raise
        return self._create_named()

    def _create_named(self) -> int:
        # Set before it exists, so that no interruption can fall between.
        self._temporary = self._folder / f".azquant-{os.urandom(8).hex()}.tmp"
        return os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)

    def _name(self) -> None:
        """Name the unnamed file: at once as the target if nothing is replaced, else temporarily."""
        name = self._target
        if self._overwrite:
            name = self._temporary = self._folder / f".azquant-{os.urandom(8).hex()}.tmp"
        try:
            # Python follows the link in /proc only when told a folder, which an absolute path then ignores.
            source = f"/proc/self/fd/{self.descriptor}"
            os.link(source, name, src_dir_fd=self.descriptor, follow_symlinks=True)
        except FileExistsError:
            raise
        except OSError:
            self._copy_to_named()  # /proc is restricted here

    def _copy_to_named(self) -> None:
        named = self._create_named()
        try:
            os.fchmod(named, stat.S_IMODE(os.fstat(self.descriptor).st_mode))
            at = 0
            while piece := os.pread(self.descriptor, _COPY_BYTES, at):
                at += os.write(named, piece)
            os.fsync(named)
        finally:
            os.close(named)

    def _move(self, temporary: Path) -> None:
        if self._overwrite:
            temporary.replace(self._target)
            return
        try:
            os.link(temporary, self._target)  # unlike a rename, never replaces what came meanwhile
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            if self._target.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
            temporary.replace(self._target)
        else:
            temporary.unlink()

    def _sync_folder(self) -> None:
        # Some file systems and permissions do not allow it; the file itself is safe and in place.
        with suppress(OSError):
            folder = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _pwrite(descriptor: int, data: memoryview, at: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, at)
    with _SEEKING:  # Windows has no positioned write
        os.lseek(descriptor, at, os.SEEK_SET)
        return os.write(descriptor, data)


def _preadv(descriptor: int, out: memoryview, at: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [out], at)
    with _SEEKING:
        os.lseek(descriptor, at, os.SEEK_SET)
        data = os.read(descriptor, len(out))
        out[: len(data)] = data
        return len(data)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _is_same(one: os.stat_result | None, other: os.stat_result) -> bool:
    return one is not None and os.path.samestat(one, other)


def _failed(path: Path, error: Exception) -> OutputError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    failed = OutputError(f"{path} cannot be written: {reason}")
    if isinstance(error, OSError):
        failed.errno = error.errno
    return failed
