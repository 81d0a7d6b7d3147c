"""The Hub as the store needs it: huggingface_hub, brought in when it is needed, with errors of our own."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn
from urllib.parse import urlsplit

from azquant.errors import ArgumentError, AzquantError, AzquantWarning, HubError, MissingDependencyError
from azquant.store.layout import PARTIAL, Progress, hash_file
from azquant.store.partial import open_partial

__all__ = ["HubClient", "HubPlace", "RemoteFile"]

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
_PLACE = re.compile(
    rf"hf:(?:/?/?hf\.co/)?(?P<repo>{_PART}/{_PART})(?::(?P<file>[^@\0]+))?(?:@(?P<revision>[^\0]+))?"
)
_LARGEST_SMALL = 1 << 20


@dataclass(frozen=True, slots=True)
class HubPlace:
    """A place on the Hub: made by :meth:`parse`."""

    repo: str
    file: str | None
    """A file of the repository, or what its name holds: ``"q4_0"``."""
    revision: str | None
    """A branch, tag or commit; None is the main branch."""

    @classmethod
    def parse(cls, text: str) -> HubPlace:
        """The place that ``text`` names. Raises ArgumentError."""
        match = _PLACE.fullmatch(text) if len(text) < 1000 else None
        if match is None or ".." in text:
            raise ArgumentError(
                f"{text[:80]!r} is no place on the Hub; write hf:ORG/REPO[:FILE or q4_0][@revision]"
            )
        return cls(match["repo"], match["file"], match["revision"])


@dataclass(frozen=True, slots=True)
class RemoteFile:
    name: str
    size: int
    sha256: str | None
    """Of large files."""
    git_id: str | None
    """Git's SHA-1 of the others."""


class HubClient:
    """One Hub: its API and its files."""

    def __init__(self, endpoint: str | None) -> None:
        try:
            import huggingface_hub
            from huggingface_hub import file_download
        except ImportError as error:
            raise MissingDependencyError(
                "pull and push need huggingface_hub: pip install 'azquant[hub]'"
            ) from error
        if endpoint is not None and urlsplit(endpoint).scheme not in ("http", "https"):
            raise ArgumentError(f"the endpoint {endpoint!r:.80} is no http(s) address")
        self.library: Any = huggingface_hub
        self._transfer: Any = file_download
        self._endpoint = endpoint.rstrip("/") if endpoint else None
        self.api: Any = huggingface_hub.HfApi(endpoint=self._endpoint, library_name="azquant")

    def files(self, place: HubPlace) -> tuple[dict[str, RemoteFile], str | None]:
        """The files of the repository by name, and the commit that the revision stands for.

        When the Hub cannot be reached: what its cache holds, and no commit.
        """
        try:
            info = self.api.model_info(place.repo, revision=place.revision, files_metadata=True)
        except Exception as error:
            if not _is_offline(error):
                self._explain(error, place)
            if cached := self._cached_files(place):
                warnings.warn(
                    f"the Hub cannot be reached; using its local cache ({error})",
                    AzquantWarning,
                    stacklevel=4,
                )
                return cached, None
            self._explain(error, place)
        found = {}
        for sibling in info.siblings or []:
            lfs = sibling.lfs
            sha256 = None if lfs is None else lfs["sha256"]
            size = sibling.size if lfs is None else lfs["size"]
            if isinstance(size, int) and isinstance(sibling.rfilename, str):
                found[sibling.rfilename] = RemoteFile(sibling.rfilename, size, sha256, sibling.blob_id)
        return found, info.sha

    def _cached_files(self, place: HubPlace) -> dict[str, RemoteFile]:
        try:
            folder = Path(
                self.library.snapshot_download(place.repo, revision=place.revision, local_files_only=True)
            )
        except Exception:  # whatever it is: there is no cache to use
            return {}
        paths = [path for path in folder.rglob("*") if path.is_file()]
        names = {path.relative_to(folder).as_posix(): path for path in paths}
        return {name: RemoteFile(name, path.stat().st_size, None, None) for name, path in names.items()}

    def cached(self, place: HubPlace, file: RemoteFile, commit: str | None) -> Path | None:
        """The file in huggingface_hub's own cache, if it is there and right."""
        revision = commit or place.revision
        path = self.library.try_to_load_from_cache(place.repo, file.name, revision=revision)
        if not isinstance(path, str):
            if commit is None:
                raise HubError(
                    f"{file.name} of {place.repo} is not in the cache, and the Hub cannot be reached"
                )
            return None
        found = Path(path)
        return found if commit is None or _is_right(found, file) else None

    def read_small(self, place: HubPlace, file: RemoteFile, commit: str | None) -> bytes:
        """The bytes of a small file, checked."""
        if file.size > _LARGEST_SMALL:
            raise HubError(f"{file.name} of {place.repo} has {file.size} bytes, too many for what it is")
        path = self.cached(place, file, commit)
        if path is None:
            with self.explaining(place, file.name):
                path = Path(
                    self.library.hf_hub_download(
                        place.repo,
                        file.name,
                        revision=commit,
                        endpoint=self._endpoint,
                        library_name="azquant",
                    )
                )
            if not _is_right(path, file):
                raise HubError(
                    f"{file.name} of {place.repo} is not what the Hub says it is; pull again later"
                )
        return path.read_bytes()

    def download(
        self,
        place: HubPlace,
        file: RemoteFile,
        commit: str | None,
        folder: Path,
        progress: Progress | None,
    ) -> Path:
        """The file in ``folder``, under a name for unfinished ones, complete and checked."""
        identity = file.sha256 or file.git_id
        if not isinstance(identity, str) or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", identity):
            raise HubError(
                f"the Hub states no checksum for {file.name} of {place.repo}; it is not downloaded"
            )
        path = folder / f"{PARTIAL}{identity}"
        with open_partial(path) as partial:
            begun = partial.seek(0, 2)
            if begun > file.size:
                begun = partial.seek(0)
                partial.truncate()
            with self.explaining(place, file.name):
                self._get(place, file, commit, _Counted(partial, file.size, progress), begun)
            partial.flush()
            if not _is_right(path, file):
                path.unlink(missing_ok=True)
                raise HubError(
                    f"{file.name} of {place.repo}: the bytes that came are not those the Hub states "
                    f"({identity[:12]}…); nothing was kept, pull again"
                )
        return path

    def _get(
        self, place: HubPlace, file: RemoteFile, commit: str | None, target: _Counted, begun: int
    ) -> None:
        url = self.library.hf_hub_url(place.repo, file.name, revision=commit, endpoint=self._endpoint)
        headers = self.library.utils.build_hf_headers(library_name="azquant")
        location = self._transfer.get_hf_file_metadata(url, headers=headers).location
        before, after = urlsplit(url), urlsplit(location)
        if after.scheme not in ("http", "https") or (before.scheme, after.scheme) == ("https", "http"):
            raise HubError(f"{file.name} of {place.repo}: redirected to {after.scheme}://, which is not safe")
        if (before.scheme, before.netloc) != (after.scheme, after.netloc):
            headers = {key: value for key, value in headers.items() if key.lower() != "authorization"}
        with _quiet(self.library.utils):
            self._transfer.http_get(
                location, target, resume_size=begun, headers=headers, expected_size=file.size
            )

    @contextmanager
    def explaining(self, place: HubPlace, file_name: str = "") -> Iterator[None]:
        """Whatever the library raises becomes a HubError."""
        try:
            yield
        except AzquantError:
            raise
        except Exception as error:
            self._explain(error, place, file_name)

    def _explain(self, error: Exception, place: HubPlace, file_name: str = "") -> NoReturn:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        status = getattr(getattr(error, "response", None), "status_code", None)
        what = f"hf:{place.repo}" + (f":{file_name}" if file_name else "")
        if "GatedRepoError" in kinds:
            text = "is gated: accept its terms on the Hub and log in (`hf auth login`)"
        elif "RevisionNotFoundError" in kinds:
            text = f"has no revision {place.revision!r}"
        elif "EntryNotFoundError" in kinds and "LocalEntryNotFoundError" not in kinds:
            text = "has no such file"
        elif "RepositoryNotFoundError" in kinds:
            text = "is not on the Hub, or is private and you are not logged in (`hf auth login`)"
        elif status in (401, 403):
            text = f"may not be used with your login (HTTP {status}); log in with `hf auth login`"
        elif _is_offline(error):
            text = (
                f"cannot be reached, or the connection broke off; pull again to go on ({_first_line(error)})"
            )
        else:
            text = f"failed: {type(error).__name__}: {_first_line(error)}"
        raise HubError(f"{what} {text}") from error


class _Counted:
    """A file that tells how much of it there is; what http_get needs of one."""

    def __init__(self, file: BinaryIO, size: int, progress: Progress | None) -> None:
        self._file, self._size, self._progress = file, size, progress

    def write(self, data: bytes) -> int:
        """Append, and tell."""
        written = self._file.write(data)
        if self._progress is not None:
            self._progress(min(self._file.tell(), self._size), self._size)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def _quiet(utils: Any) -> Iterator[None]:
    """Without the library's own progress bar."""
    if utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def _is_offline(error: Exception) -> bool:
    """Whether there was no answer, rather than a bad one. Its HTTP client depends on the version."""
    kinds = type(error).__mro__
    if any(kind.__name__ in ("OfflineModeIsEnabled", "LocalEntryNotFoundError") for kind in kinds):
        return True
    if getattr(error, "response", None) is not None:
        return False
    library = any(
        kind.__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests") for kind in kinds
    )
    return library or isinstance(error, (ConnectionError, TimeoutError))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _is_right(path: Path, file: RemoteFile) -> bool:
    """Whether the bytes at ``path`` are those the Hub states."""
    if path.stat().st_size != file.size:
        return False
    if file.sha256 is not None:
        return hash_file(path) == f"sha256:{file.sha256}"
    digest = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as opened:
        while piece := opened.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest() == file.git_id
