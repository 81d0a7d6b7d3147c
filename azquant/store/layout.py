"""Where things lie in a store, and how they are written so that nothing is ever half there.

::

    blobs/sha256-<64 digits>                        everything, named by the SHA-256 of its bytes
    manifests/<host>/<namespace>/<model>/<tag>      JSON: what a model is made of
    manifests-v2/...                                newer Ollama: links to manifests that are blobs themselves

Blobs come first, the manifest last, each in one step: a process that is killed leaves blobs that nothing
refers to, never a manifest without its blobs. Whoever adds holds a shared lock (``.azquant.lock``) from its
first blob to its manifest; whoever deletes blobs holds it alone. The kernel lets go of it when the process
ends, however that happens. Ollama itself takes no such lock: while it pulls or creates, delete nothing
here.

Source: docs/faq and docs/import of Ollama, and its packages manifest and server.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from azquant.errors import InputFileError, ModelNotFoundError, OutputError, StoreError
from azquant.gguf.atomic import AtomicFile
from azquant.store.manifest import LARGEST_MANIFEST, Layer, Manifest, is_digest, parse_manifest
from azquant.store.names import ModelName

try:
    import fcntl
except ImportError:  # Windows: one process at a time is up to the user
    fcntl = None  # type: ignore[assignment]

__all__ = ["Layout", "Progress", "hash_file"]

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

ROOTS = ("manifests-v2", "manifests")
LOCK = ".azquant.lock"
PARTIAL = ".azquant-pull-"
"""What the names of unfinished downloads begin with; also AtomicFile's begin with ``.azquant-``."""

_PIECE = 1 << 20


class Layout:
    """The files of the store at ``root``, which need not exist before something is written."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = root / "blobs"
        self.manifests = root / "manifests"
        self.added: set[str] = set()
        """Digests of the blobs that were written through this object."""

    # ---- locks -------------------------------------------------------------------------------------------

    @contextmanager
    def adding(self) -> Iterator[None]:
        """While blobs and manifests are added: no blob is deleted meanwhile."""
        with self._lock(alone=False):
            yield

    @contextmanager
    def deleting(self) -> Iterator[None]:
        """While blobs are deleted: nobody adds meanwhile."""
        with self._lock(alone=True):
            yield

    @contextmanager
    def _lock(self, alone: bool) -> Iterator[None]:
        try:
            for folder in (self.root, self.blobs, self.manifests):
                folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputError(f"the store {self.root} cannot be written: {error.strerror}") from error
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            yield
        finally:
            os.close(descriptor)

    # ---- blobs -------------------------------------------------------------------------------------------

    def blob_path(self, digest: str) -> Path:
        """Where the blob of this digest lies, or would."""
        if not is_digest(digest):
            raise StoreError(f"{digest!r:.90} is no digest (sha256: and 64 digits)", path=self.root)
        return self.blobs / digest.lower().replace(":", "-", 1)

    def blob(self, layer: Layer) -> Path:
        """The file of ``layer``. Raises StoreError when it is missing or of another size."""
        path = self.blob_path(layer.digest)
        size = _file_size(path)
        if size is None:
            raise StoreError(
                "this blob is missing; make or pull the model again, `azquant store check` lists which",
                path=path,
            )
        if size != layer.size:
            raise StoreError(
                f"this blob has {size} bytes, its manifest says {layer.size}; make or pull the model again",
                path=path,
            )
        return path

    def read_small(self, layer: Layer, largest: int = 64 << 20) -> bytes:
        """The bytes of a layer of text, whose digest is checked."""
        path = self.blob(layer)
        if layer.size > largest:
            raise StoreError(f"a layer of {layer.size} bytes is too large for {layer.media_type}", path=path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputFileError(f"{path} cannot be read: {error.strerror}") from error
        if sha256(data) != layer.digest:
            raise StoreError("this blob is not what its name says (its SHA-256 is another)", path=path)
        return data

    def add_bytes(self, data: bytes, media_type: str) -> Layer:
        """A blob of ``data``. Call it within :meth:`adding`."""
        layer = Layer(media_type, sha256(data), len(data))
        path = self.blob_path(layer.digest)
        if _file_size(path) != len(data) or path.read_bytes() != data:
            with AtomicFile(path, len(data), overwrite=True) as file:
                file.write(memoryview(data))
                file.sync()
                file.publish()
            self.added.add(layer.digest)
        return layer

    def add_file(self, source: Path, media_type: str, progress: Progress | None = None) -> Layer:
        """A blob with the bytes of ``source``, which is read twice. Call it within :meth:`adding`.

        Raises InputFileError when it cannot be read or changes meanwhile, OutputError when there is no room.
        """
        with _open(source) as file:
            size = os.fstat(file.fileno()).st_size
            digest = _hash(file, size, progress)
            layer = Layer(media_type, digest, size)
            path = self.blob_path(digest)
            if _file_size(path) == size and hash_file(path) == digest:
                return layer
            file.seek(0)
            copied = hashlib.sha256()
            with AtomicFile(path, size, overwrite=True) as target:
                while piece := file.read(_PIECE):
                    copied.update(piece)
                    target.write(memoryview(piece))
                if f"sha256:{copied.hexdigest()}" != digest:
                    raise InputFileError(f"{source} changed while it was read; try again when it is complete")
                target.sync()
                target.publish()
            self.added.add(digest)
        return layer

    def adopt(self, partial: Path, layer: Layer) -> None:
        """Make ``partial``, a checked file in the folder of blobs, the blob of ``layer``."""
        try:
            partial.replace(self.blob_path(layer.digest))
        except OSError as error:
            raise OutputError(f"{partial} cannot become a blob: {error.strerror}") from error

    # ---- manifests ---------------------------------------------------------------------------------------

    def names(self) -> dict[ModelName, Path]:
        """Every model with its manifest, in order. Files with names that no model can have are left out."""
        found: dict[ModelName, Path] = {}
        for path in self.manifest_files():
            try:
                host, namespace, model, tag = path.relative_to(self.root).parts[1:]
                name = ModelName.parse(f"{host}/{namespace}/{model}:{tag}")
            except ValueError:  # also ArgumentError
                continue
            found.setdefault(name, path)
        return dict(sorted(found.items()))

    def manifest_files(self) -> Iterator[Path]:
        """Every file four levels below a folder of manifests, the newer kind first."""
        for root in ROOTS:
            folders = [self.root / root]
            for _ in range(3):
                folders = [path for folder in folders for path in _entries(folder) if path.is_dir()]
            for path in (path for folder in folders for path in _entries(folder)):
                if not path.name.startswith(".azquant-") and (path.is_symlink() or path.is_file()):
                    yield path

    def find(self, name: ModelName) -> Path | None:
        """The manifest of ``name``, whose letters may be in another case there."""
        for root in ROOTS:
            path = self.root.joinpath(root, *name.parts)
            if path.is_symlink() or path.is_file():
                return path
        return next((path for other, path in self.names().items() if other.matches(name)), None)

    def manifest(self, name: ModelName) -> tuple[Manifest, bytes, Path]:
        """The manifest of ``name``, its bytes and where it lies. Raises ModelNotFoundError, StoreError."""
        path = self.find(name)
        if path is None:
            others = [other.tag for other in self.names() if other.parts[:3] == name.parts[:3]]
            hint = f"; it has {', '.join(others)}" if others else ""
            raise ModelNotFoundError(f"there is no model {name} in the store {self.root}{hint}")
        data = self.read_manifest(path)
        return self._runnable(parse_manifest(data, path), path), data, path

    def read_manifest(self, path: Path) -> bytes:
        """The bytes of a manifest. A link must lead to a blob of this store which is what its name says."""
        try:
            if path.is_symlink():
                target = path.resolve()
                if target.parent != self.blobs.resolve() or not is_digest(target.name):
                    raise StoreError("this link leads to no blob of the store", path=path)
            size = path.stat().st_size
            if size > LARGEST_MANIFEST:
                raise StoreError(f"{size} bytes are too many for a manifest", path=path)
            data = path.read_bytes()
        except OSError as error:
            if isinstance(error, FileNotFoundError) and path.is_symlink():
                raise StoreError("this link leads to a blob that is missing", path=path) from None
            raise InputFileError(f"{path} cannot be read: {error.strerror}") from error
        if path.is_symlink() and sha256(data) != target.name.lower().replace("-", ":", 1):
            raise StoreError("this manifest is not what the name of its blob says", path=path)
        return data

    def _runnable(self, manifest: Manifest, path: Path) -> Manifest:
        """The one manifest with a GGUF model that a list leads to, or the manifest itself."""
        if manifest.config is not None:
            return manifest
        for digest in manifest.children:
            blob = self.blob_path(digest)
            with suppress(OSError):
                child = parse_manifest(blob.read_bytes(), blob)
                if child.config is not None and child.of_type("application/vnd.ollama.image.model"):
                    return child
        raise StoreError("none of the manifests in this list has a GGUF model", path=path)

    def write_manifest(self, name: ModelName, data: bytes) -> Path:
        """Give the model its name: one step, after which it is there. Call it within :meth:`adding`."""
        old = self.find(name)
        parts = name.parts if old is None else old.relative_to(self.root).parts[1:]
        path = self.manifests.joinpath(*parts)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}") from error
        if not path.parent.resolve().is_relative_to(self.manifests.resolve()):
            raise StoreError("a link leads out of the folder of manifests", path=path.parent)
        with AtomicFile(path, len(data), overwrite=True) as file:
            file.write(memoryview(data))
            file.sync()
            file.publish()
        if old is not None and old != path:  # newer Ollama would go on reading the link
            old.unlink(missing_ok=True)
        return path

    def remove_manifest(self, path: Path) -> None:
        """Take the model's name away, and folders that are empty then. Call it within :meth:`deleting`."""
        try:
            path.unlink()
        except OSError as error:
            raise OutputError(f"{path} cannot be removed: {error.strerror}") from error
        top = self.root / path.relative_to(self.root).parts[0]
        for folder in path.parents:
            if folder == top:
                break
            with suppress(OSError):
                folder.rmdir()

    def references(self) -> set[str]:
        """The digests of all blobs that any manifest refers to.

        Raises StoreError when one of the manifests cannot be read: what it refers to is not known then.
        """
        found: set[str] = set()
        for path in self.manifest_files():
            self.add_references(path, found)
        return found

    def add_references(self, path: Path, found: set[str]) -> None:
        """Add what the manifest at ``path`` refers to, directly and through lists, to ``found``."""
        if path.is_symlink():
            found.add(path.resolve().name.replace("-", ":", 1).lower())
        manifest = parse_manifest(self.read_manifest(path), path)
        found.update(layer.digest for layer in manifest.blobs())
        for digest in manifest.children:
            found.add(digest)
            blob = self.blob_path(digest)
            try:
                child = parse_manifest(blob.read_bytes(), blob)
            except OSError as error:
                raise StoreError(f"this manifest cannot be read: {error.strerror}", path=blob) from error
            found.update(layer.digest for layer in child.blobs())

    def collect(self, candidates: set[str]) -> list[Path]:
        """Delete the ``candidates`` (digests) that nothing refers to; which those were.

        Call it within :meth:`deleting`. When some manifest cannot be read, nothing is deleted: StoreError.
        """
        removed = []
        for digest in sorted(candidates - self.references()):
            path = self.blob_path(digest)
            with suppress(FileNotFoundError):
                try:
                    path.unlink()
                except PermissionError as error:
                    raise OutputError(f"{path} cannot be removed: {error.strerror}") from error
                removed.append(path)
        return removed


def sha256(data: bytes) -> str:
    """The digest of ``data``, as manifests write it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def hash_file(path: Path, progress: Progress | None = None) -> str:
    """The digest of the file at ``path``. Raises InputFileError."""
    with _open(path) as file:
        return _hash(file, os.fstat(file.fileno()).st_size, progress)


def _hash(file: BinaryIO, size: int, progress: Progress | None) -> str:
    digest, done = hashlib.sha256(), 0
    while piece := file.read(_PIECE):
        digest.update(piece)
        done += len(piece)
        if progress is not None:
            progress(done, max(size, done))
    return f"sha256:{digest.hexdigest()}"


def _open(path: Path) -> BinaryIO:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputFileError(f"{path} is not a file")
        return path.open("rb")
    except FileNotFoundError:
        raise InputFileError(f"{path} does not exist") from None
    except InputFileError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputFileError(f"{path} cannot be read: {reason}") from error


def _entries(folder: Path) -> list[Path]:
    """What is in ``folder``, in order; nothing when it is gone, as another process may have removed it."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputFileError(f"{folder} cannot be listed: {error.strerror}") from error


def _file_size(path: Path) -> int | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None
