"""Whatever ends a write, the old file is whole and nothing is left: kills, limits, full disks, no right."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from azquant.errors import AzquantError, OutputError
from azquant.gguf import Piece, TensorSpec, edit_gguf, keys, merge_gguf, open_gguf, split_gguf, write_gguf
from azquant.types import get_type

ROOT = Path(__file__).resolve().parent.parent
I8 = get_type("i8")
SIZE = 8 << 20
COUNT = 8

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills and limits of POSIX")


def make(path: Path, fill: int, size: int = SIZE) -> Path:
    """A file of eight tensors, every byte of them ``fill``."""
    specs = [TensorSpec(f"t{i}", (size // COUNT,), I8) for i in range(COUNT)]
    metadata = {"general.name": keys.string("x"), "fill": keys.u8(fill)}
    write_gguf(path, metadata, specs, lambda spec: [np.full(spec.nbytes, fill, np.uint8)], verify=False)
    return path


def fill_of(path: Path) -> int:
    """What a whole file is filled with; fails on a file that is not one of :func:`make`'s."""
    with open_gguf(path) as file:
        values = {int(t.data.min()) for t in file.tensors.values()}
        values |= {int(t.data.max()) for t in file.tensors.values()}
        assert len(file.tensors) == COUNT
        assert values == {file.metadata["fill"]}
        return values.pop()


def write_pieces(path: Path) -> None:
    """The file of :func:`make` filled with 2, its data made and written by three threads."""
    specs = [TensorSpec(f"t{i}", (SIZE // COUNT,), I8) for i in range(COUNT)]
    metadata = {"general.name": keys.string("x"), "fill": keys.u8(2)}
    size = SIZE // COUNT // 16

    def data(spec: TensorSpec) -> Iterator[Piece]:
        for _ in range(16):
            yield Piece(size, lambda: [np.full(size, 2, np.uint8)])

    write_gguf(path, metadata, specs, data, threads=3, overwrite=True)


# Every way to write a file in a folder that holds old.gguf (filled with 1); in.gguf (2) and its shards lie in
# the folder beside. What may be there afterwards: exactly old.gguf, or the new file or files.
WRITES: dict[str, tuple[Callable[[Path, Path], object], set[str]]] = {
    "edit": (
        lambda source, folder: edit_gguf(
            source / "in.gguf", folder / "old.gguf", values={"general.name": "y"}, overwrite=True
        ),
        {"old.gguf"},
    ),
    "edit in place": (
        lambda source, folder: edit_gguf(folder / "old.gguf", values={"general.name": "y"}),
        {"old.gguf"},
    ),
    "merge": (
        lambda source, folder: merge_gguf(
            source / "cut-00001-of-00004.gguf", folder / "old.gguf", overwrite=True
        ),
        {"old.gguf"},
    ),
    "pieces": (lambda source, folder: write_pieces(folder / "old.gguf"), {"old.gguf"}),
    "split": (
        lambda source, folder: split_gguf(source / "in.gguf", folder / "new", max_tensors=2),
        {"old.gguf", *(f"new-0000{i}-of-00004.gguf" for i in (1, 2, 3, 4))},
    ),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    make(folder / "in.gguf", 2)
    split_gguf(folder / "in.gguf", folder / "cut", max_tensors=2, verify=False)
    return folder


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from test_gguf_crash import WRITES
print("ready", flush=True)
sys.stdin.readline()
WRITES[sys.argv[1]][0](Path(sys.argv[2]), Path(sys.argv[3]))
print("done", flush=True)
"""


def start(name: str, source: Path, folder: Path) -> subprocess.Popen[str]:
    """Another process that waits for a line before it writes."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, name, str(source), str(folder), str(Path(__file__).parent)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="a kill leaves a temporary file without O_TMPFILE")
@pytest.mark.parametrize("name", WRITES)
def test_kills_at_random_moments(tmp_path: Path, source: Path, name: str) -> None:
    """Some fall before the write, some into it, some after; the moment is drawn anew in each run."""
    _, outputs = WRITES[name]
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder / "old.gguf", 1)
    process = start(name, source, folder)
    began = time.monotonic()
    go(process)
    process.communicate(timeout=60)
    whole = time.monotonic() - began
    shutil.rmtree(folder)
    killed = 0
    for _ in range(5):
        folder.mkdir()
        make(folder / "old.gguf", 1)
        process = start(name, source, folder)
        go(process)
        time.sleep(random.uniform(0, whole))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        killed += process.returncode == -signal.SIGKILL
        left = {path.name for path in folder.iterdir()}
        # A replaced file has a second name for the moment between link and rename.
        debris = {name for name in left - outputs if not name.startswith(".azquant-")}
        assert not debris
        assert "old.gguf" in left
        assert fill_of(folder / "old.gguf") in (1, 2)
        for path in folder.glob("new-*.gguf"):
            with open_gguf(path, join=False) as file:  # whole, though a kill may fall between two of them
                assert all(int(t.data.min()) == 2 for t in file.tensors.values())
        shutil.rmtree(folder)
    assert killed


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("limit", [0, 4096, SIZE // 5])
def test_a_limit_on_the_size_of_files(tmp_path: Path, source: Path, name: str, limit: int) -> None:
    write, _ = WRITES[name]
    make(tmp_path / "old.gguf", 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OutputError, match="File too large"):
            write(source, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["old.gguf"]
    assert fill_of(tmp_path / "old.gguf") == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)]
    mount = shutil.which("mount")
    if mount is None or os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("seen_before", [True, False])
def test_a_full_disk(
    small_disk: Path, source: Path, monkeypatch: pytest.MonkeyPatch, name: str, seen_before: bool
) -> None:
    """8 of 12 MB are taken: refused before the first byte, or, where space cannot be known, at the last."""
    write, _ = WRITES[name]
    make(small_disk / "old.gguf", 1)
    if not seen_before:
        real = shutil.disk_usage(small_disk)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=1 << 40))
    with pytest.raises(OutputError, match="nothing was written" if seen_before else "No space left"):
        write(source, small_disk)
    assert [path.name for path in small_disk.iterdir()] == ["old.gguf"]
    assert fill_of(small_disk / "old.gguf") == 1
    (small_disk / "old.gguf").unlink()
    free = os.statvfs(small_disk)  # all space is given back
    assert free.f_bavail * free.f_frsize > 11 << 20


@pytest.mark.parametrize("name", WRITES)
def test_a_read_only_place(tmp_path: Path, source: Path, name: str) -> None:
    write, _ = WRITES[name]
    place = tmp_path / "place"
    place.mkdir()
    make(place / "old.gguf", 1)
    root = os.geteuid() == 0
    if root:  # whom permissions do not stop, but a read-only mount does
        bind = ["mount", "--bind", str(place), str(place)]
        again = ["mount", "-o", "remount,ro,bind", str(place)]
        if subprocess.run(bind, capture_output=True).returncode:
            pytest.skip("no right to mount")
        subprocess.run(again, check=True)
    else:
        place.chmod(0o500)
    try:
        with pytest.raises(OutputError, match=r"Read-only file system|Permission denied"):
            write(source, place)
        assert [path.name for path in place.iterdir()] == ["old.gguf"]
        assert fill_of(place / "old.gguf") == 1
    finally:
        if root:
            subprocess.run(["umount", str(place)], check=True)
        else:
            place.chmod(0o700)


@pytest.mark.parametrize("link", ["hard", "symbolic"])
def test_an_output_that_is_the_input_by_another_name(tmp_path: Path, source: Path, link: str) -> None:
    first = make(tmp_path / "in.gguf", 3, 1 << 16)
    other = tmp_path / "other.gguf"
    if link == "hard":
        other.hardlink_to(first)
    else:
        other.symlink_to(first)
    shards = split_gguf(first, tmp_path / "cut", max_tensors=4)
    target = tmp_path / "shard.gguf"
    if link == "hard":
        target.hardlink_to(shards[1])
    else:
        target.symlink_to(shards[1])
    attempts: list[Callable[[], object]] = [
        lambda: edit_gguf(first, other, values={"general.name": "y"}),
        lambda: merge_gguf(shards[0], target, overwrite=True),
        lambda: split_gguf(shards[0], tmp_path / "cut", max_tensors=4, overwrite=True),
    ]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for attempt in attempts:
        with pytest.raises(AzquantError, match="same file as the input"):
            attempt()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
