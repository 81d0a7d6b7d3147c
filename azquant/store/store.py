"""The store of models: every verb of model management as a method."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import TypeAlias

from azquant.errors import (
    ArgumentError,
    AzquantError,
    AzquantWarning,
    InputFileError,
    ModelNotFoundError,
    OutputError,
    StoreError,
)
from azquant.store import manifest as media
from azquant.store.build import build, recipe_for
from azquant.store.check import Problem, check
from azquant.store.compare import Comparison, compare
from azquant.store.folder import export_folder, read_folder
from azquant.store.info import ModelInfo, ModelRow, read_info, read_row
from azquant.store.layout import Layout, Progress
from azquant.store.manifest import parse_manifest
from azquant.store.modelfile import Modelfile, read_modelfile
from azquant.store.names import ModelName

__all__ = ["Store", "default_root", "ollama_root", "resolve"]

# Within the class, ``list`` is its method.
Rows: TypeAlias = list[ModelRow]
Paths: TypeAlias = list[Path]
Problems: TypeAlias = list[Problem]


def default_root() -> Path:
    """Where models are kept: ``AZQUANT_MODELS``, or ``azquant/models`` in the platform's data folder."""
    if chosen := os.environ.get("AZQUANT_MODELS"):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "azquant" / "models"
    if sys.platform == "win32":
        return (
            Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "azquant" / "models"
        )
    # A relative path there must be ignored, says the XDG base directory specification.
    data = os.environ.get("XDG_DATA_HOME", "")
    return (
        (Path(data) if Path(data).is_absolute() else Path.home() / ".local" / "share") / "azquant" / "models"
    )


def ollama_root() -> Path:
    """Where Ollama keeps this user's models: ``OLLAMA_MODELS``, or ``~/.ollama/models``."""
    return Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models")


class Store:
    """A folder of models in Ollama's layout. Several processes may use it at once.

    >>> store = Store("models")
    >>> store.create("az-llm:v1.0", "az-llm-v1.0-q4_0.gguf")
    >>> [str(row.name) for row in store.list()]
    ['az-llm:v1.0']

    ``root``: the folder; default :func:`default_root`. ``"ollama"``: Ollama's own, :func:`ollama_root`. It
    is made when something is first written. Names are texts such as ``"az-llm:v1.0"``; without a tag
    ``latest`` is meant. Every method raises ArgumentError for a name that cannot be one, ModelNotFoundError
    for a model that is not there, StoreError (with the path) for a damaged file.
    """

    def __init__(self, root: str | PathLike[str] | None = None) -> None:
        if root == "ollama":
            root = ollama_root()
        self.root = Path(default_root() if root is None else root).expanduser()
        if self.root.exists() and not self.root.is_dir():
            raise InputFileError(f"the store {self.root} is not a folder")
        self._layout = Layout(self.root)

    def __repr__(self) -> str:
        return f"<Store {str(self.root)!r}>"

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._layout.find(ModelName.parse(name)) is not None

    def __iter__(self) -> Iterator[ModelName]:
        return iter(self._layout.names())

    # ---- looking -----------------------------------------------------------------------------------------

    def list(self) -> Rows:
        """Every model, in order of its name. A damaged one is listed with what is wrong with it."""
        return [read_row(self._layout, name) for name in self._layout.names()]

    def show(self, name: str) -> ModelInfo:
        """All about a model. Raises GGUFError too."""
        return read_info(self._layout, self._existing(name))

    def path(self, name: str) -> Path:
        """The GGUF file of a model, to be read, never written: other models may share it."""
        found, _, _ = self._layout.manifest(ModelName.parse(name))
        models = found.of_type(media.MODEL)
        if not models:
            raise ArgumentError(f"the model {name} is not a GGUF model")
        return self._layout.blob(models[0])

    def versions(self, name: str) -> Rows:
        """The tags of a model, oldest first. What tag ``name`` has does not matter."""
        wanted = ModelName.parse(name)
        rows = [
            read_row(self._layout, other)
            for other in self._layout.names()
            if [p.lower() for p in other.parts[:3]] == [p.lower() for p in wanted.parts[:3]]
        ]
        if not rows:
            raise ModelNotFoundError(f"there is no model {wanted.model} in the store {self.root}")
        return sorted(rows, key=lambda row: (row.modified, row.name))

    def compare(self, before: str, after: str) -> Comparison:
        """What differs between two models; both files are read whole."""
        return compare(self.show(before), self.show(after))

    # ---- changing ----------------------------------------------------------------------------------------

    def create(
        self,
        name: str,
        source: str | PathLike[str] | Modelfile,
        *,
        modelfile: bool = False,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> ModelRow:
        """Put a model into the store: from a GGUF file, or the path of a Modelfile (``modelfile=True``).

        The file is copied; its bytes are kept once however many models have them. A GGUF file alone gets the
        template, stop texts and context length that :func:`azquant.conversion.modelfile.modelfile_text` finds
        in it, so that Ollama runs it as it is meant. Raises OutputError when the
        name is taken (unless ``overwrite``) or there is no room; GGUFError, InputFileError, ModelfileError.
        """
        target = self._new(name, overwrite)
        if isinstance(source, Modelfile):
            recipe, folder = source, Path()
        elif modelfile:
            recipe, folder = read_modelfile(source), Path(source).absolute().parent
        else:
            if not Path(source).exists():
                raise InputFileError(f"{source} does not exist")
            recipe, folder = recipe_for(Path(source).absolute()), Path()
        with self._adding() as layout:
            data = build(layout, recipe, folder, progress)
            replaced = self._publish(target, data, overwrite)
        self._collect(replaced)
        return read_row(self._layout, target)

    def cp(self, source: str, target: str, *, overwrite: bool = False) -> ModelRow:
        """Give a model a second name; no blob is copied. Raises OutputError when that name is taken."""
        with self._adding():
            found, data, _ = self._layout.manifest(ModelName.parse(source))
            for layer in found.blobs():
                self._layout.blob(layer)
            name = self._new(target, overwrite)
            replaced = self._publish(name, data, overwrite)
        self._collect(replaced)
        return read_row(self._layout, name)

    def rm(self, name: str) -> Paths:
        """Remove a model, and the blobs that no other model needs; which those were.

        When the manifest of another model cannot be read, blobs are kept, with a warning: it may need them.
        """
        wanted = ModelName.parse(name)
        with self._layout.deleting():
            path = self._layout.find(wanted)
            if path is None:
                self._layout.manifest(wanted)  # raises
            candidates: set[str] = set()
            while path is not None:
                try:
                    self._layout.add_references(path, candidates)
                except StoreError as error:
                    warnings.warn(
                        f"{error}; its blobs stay: see `azquant store check`", AzquantWarning, stacklevel=2
                    )
                self._layout.remove_manifest(path)
                path = self._layout.find(wanted)
            return self._collect_locked(candidates)

    def check(
        self, *, repair: bool = False, quick: bool = False, progress: Progress | None = None
    ) -> Problems:
        """What is damaged, and what no model needs; ``repair`` removes the latter. ``quick`` hashes nothing.

        Ollama takes no part in the store's lock: do not repair its store while it pulls or creates a model.
        """
        return check(self._layout, repair=repair, quick=quick, progress=progress)

    # ---- carrying ----------------------------------------------------------------------------------------

    def export(self, name: str, folder: str | PathLike[str], *, progress: Progress | None = None) -> Path:
        """Write a model into a new plain folder, with checksums and a Modelfile."""
        return export_folder(self._layout, self._existing(name), Path(folder), progress)

    def import_(
        self,
        folder: str | PathLike[str],
        name: str | None = None,
        *,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> ModelRow:
        """Read a model from a folder that :meth:`export` wrote; every byte is checked against its digest.

        ``name``: default the name it was exported under.
        """
        own, data, blobs = read_folder(Path(folder))
        target = self._new(own if name is None else name, overwrite)
        with self._adding() as layout:
            for path, layer in blobs:
                added = layout.add_file(path, layer.media_type, progress)
                if added.digest != layer.digest:
                    raise StoreError(
                        f"its SHA-256 is {added.digest[7:19]}…, not {layer.digest[7:19]}…; copy it again",
                        path=path,
                    )
            replaced = self._publish(target, data, overwrite)
        self._collect(replaced)
        return read_row(self._layout, target)

    def pull(
        self,
        source: str,
        name: str | None = None,
        *,
        endpoint: str | None = None,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> ModelRow:
        """Download a model: ``hf:ORG/REPO[:FILE or quant][@revision]``; see :mod:`azquant.store.hub`."""
        from azquant.store.hub import pull

        return pull(self, source, name, endpoint=endpoint, overwrite=overwrite, progress=progress)

    def push(
        self,
        name: str,
        target: str,
        *,
        endpoint: str | None = None,
        create: bool = False,
        private: bool = False,
    ) -> str:
        """Upload a model to ``hf:ORG/REPO[:FILE][@revision]``; the URL of the commit."""
        from azquant.store.hub import push

        return push(self, name, target, endpoint=endpoint, create=create, private=private)

    # ---- within ------------------------------------------------------------------------------------------

    @contextmanager
    def _adding(self) -> Iterator[Layout]:
        """To add a model through; what an attempt that failed wrote is taken away again."""
        layout = Layout(self.root)
        try:
            with layout.adding():
                yield layout
        except BaseException:
            if layout.added:
                with suppress(AzquantError), layout.deleting():
                    layout.collect(layout.added)
            raise

    def _existing(self, name: str) -> ModelName:
        """The name as it is spelt in the store."""
        wanted = ModelName.parse(name)
        return next((other for other in self._layout.names() if other.matches(wanted)), wanted)

    def _new(self, name: str, overwrite: bool) -> ModelName:
        wanted = self._existing(name)
        if not overwrite and self._layout.find(wanted) is not None:
            raise OutputError(f"the model {wanted} already exists; choose another tag or ask to overwrite it")
        return wanted

    def _publish(self, name: ModelName, data: bytes, overwrite: bool) -> set[str]:
        """Write the manifest; the digests of what it replaces, which may be needed no more."""
        replaced: set[str] = set()
        old = self._layout.find(name)
        if old is not None:
            if not overwrite:
                raise OutputError(
                    f"the model {name} already exists; choose another tag or ask to overwrite it"
                )
            try:
                self._layout.add_references(old, replaced)
            except (StoreError, InputFileError):
                replaced = set()
        self._layout.write_manifest(name, data)
        new = {layer.digest for layer in parse_manifest(data, self.root).blobs()}
        return replaced - new

    def _collect(self, candidates: set[str]) -> None:
        if candidates:
            with self._layout.deleting():
                self._collect_locked(candidates)

    def _collect_locked(self, candidates: set[str]) -> Paths:
        try:
            return self._layout.collect(candidates)
        except (StoreError, InputFileError) as error:
            warnings.warn(
                f"{error}: no blob was deleted, that model may need it; see `azquant store check`",
                AzquantWarning,
                stacklevel=3,
            )
            return []


def resolve(text: str | PathLike[str], root: str | PathLike[str] | None = None) -> Path:
    """The file that ``text`` means: a path, or NAME:TAG of a model in the store at ``root``.

    What there is under that path comes first. What is neither is returned as a path if it looks like one
    (``.gguf`` at the end, ``./`` or ``/`` or ``~`` at the beginning), so that opening it says what is
    wrong; otherwise InputFileError.
    """
    path = Path(text)
    shown = str(text)
    try:
        if not isinstance(text, str) or path.exists():
            return path
        if shown.startswith((".", "/", "~")) or path.suffix.lower() == ".gguf":
            return path
        store = Store(root)
        if shown in store:
            return store.path(shown)
    except (ArgumentError, ValueError):
        return path
    raise InputFileError(f"{shown} does not exist: neither a file nor a model in the store {store.root}")
