"""Names that try to leave the store, damaged files, no room: clear errors, and nothing lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from store_support import digest, files, put_blob, put_model, tiny_gguf, write_gguf_file

from azquant.errors import (
    ArgumentError,
    AzquantError,
    AzquantWarning,
    ConversionError,
    GGUFError,
    InputFileError,
    ModelfileError,
    OutputError,
    StoreError,
)
from azquant.store import ModelName, Store
from azquant.store.layout import LOCK


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """With one model, ``m:1``."""
    put_model(tmp_path / "store", "m", "1", [("model", tiny_gguf()), ("system", b"Hi.")])
    return Store(tmp_path / "store")


def manifest_path(store: Store, name: str = "m", tag: str = "1") -> Path:
    return store.root / "manifests" / "registry.ollama.ai" / "library" / name / tag


# ---- names -------------------------------------------------------------------------------------------

BAD_NAMES = [
    "",
    ".",
    "..",
    "../x",
    "../../etc/passwd",
    "/x",
    "/etc/passwd:latest",
    "//x",
    "a//b",
    "a/b/c/d",
    "a/../b",
    "x/..",
    "x:..",
    "x:../../y",
    "x:",
    ":x",
    "a:b:c",
    "x/y:z/w",
    "x\0y",
    "x:\0",
    "x y",
    "x\ny",
    "-x",
    ".x",
    "x\\y",
    "C:\\x",
    "x@sha256:" + "0" * 64,
    "ə",
    "x:ə",
    "n.s/x",
    "a" * 81,
    "x:" + "t" * 81,
    "h" * 351 + "/n/x",
    "x" * 100_000,
    "con",
    "x:NUL",
    "aux.gguf",
    "com1/x",
    "x.",
    "~/x",
    "$HOME",
    "x*",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=[repr(name[:20]) for name in BAD_NAMES])
def test_a_name_that_cannot_be_one_is_refused_everywhere(store: Store, tmp_path: Path, name: str) -> None:
    gguf = write_gguf_file(tmp_path / "x.gguf")
    folder = store.export("m:1", tmp_path / "folder")
    before = files(tmp_path)
    attempts: list[Callable[[], object]] = [
        lambda: store.create(name, gguf),
        lambda: store.cp("m:1", name),
        lambda: store.cp(name, "n"),
        lambda: store.rm(name),
        lambda: store.show(name),
        lambda: store.export(name, tmp_path / "out"),
        lambda: store.import_(folder, name),
        lambda: store.pull("hf:a/b", name, endpoint="http://127.0.0.1:9"),
    ]
    for attempt in attempts:
        with pytest.raises(ArgumentError, match="name"):
            attempt()
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("x", ("registry.ollama.ai", "library", "x", "latest")),
        ("x:v1.0-q4_0", ("registry.ollama.ai", "library", "x", "v1.0-q4_0")),
        ("me/x", ("registry.ollama.ai", "me", "x", "latest")),
        ("hf.co/Org/Re.po:Q4_0", ("hf.co", "Org", "Re.po", "Q4_0")),
        ("localhost:5000/n/x:t", ("localhost:5000", "n", "x", "t")),
        ("https://h.io/n/x", ("h.io", "n", "x", "latest")),
        ("a" * 80, ("registry.ollama.ai", "library", "a" * 80, "latest")),
    ],
)
def test_names_are_filled_in_as_ollama_does(text: str, parts: tuple[str, ...]) -> None:
    name = ModelName.parse(text)
    assert name.parts == parts
    assert ModelName.parse(str(name)) == name


def test_a_link_out_of_the_manifests_is_not_written_through(store: Store, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (store.root / "manifests" / "registry.ollama.ai" / "evil").symlink_to(outside)
    with pytest.raises((StoreError, OutputError)):
        store.create("evil/../m", write_gguf_file(tmp_path / "x.gguf")) if False else store.cp(
            "m:1", "evil/x"
        )
    assert not any(path.is_file() for path in outside.rglob("*"))


# ---- manifests ---------------------------------------------------------------------------------------


def edit(change: Callable[[dict], None]) -> Callable[[bytes], bytes]:
    def edited(data: bytes) -> bytes:
        value = json.loads(data)
        change(value)
        return json.dumps(value).encode()

    return edited


BAD_MANIFESTS = {
    "empty": (lambda data: b"", "not JSON"),
    "cut": (lambda data: data[: len(data) // 2], "not JSON"),
    "deep": (lambda data: b"[" * 100_000, "not JSON"),
    "bytes": (lambda data: b"\xff\xfe\x00", "not JSON"),
    "list": (lambda data: b"[]", "schemaVersion 2"),
    "version": (edit(lambda m: m.update(schemaVersion=1)), "schemaVersion 2"),
    "no layers": (edit(lambda m: m.pop("layers")), "no list of layers"),
    "no config": (edit(lambda m: m.pop("config")), "config of the manifest is missing"),
    "path": (
        edit(lambda m: m["layers"][0].update(digest="../../../../etc/passwd")),
        r"layers\[0\].digest of the manifest is '../../../../etc/passwd'",
    ),
    "short digest": (edit(lambda m: m["layers"][0].update(digest="sha256:00")), "64 digits"),
    "number": (edit(lambda m: m["layers"][0].update(digest=7)), "64 digits"),
    "size": (edit(lambda m: m["layers"][0].update(size=-1)), "no number of bytes"),
    "type": (edit(lambda m: m["layers"][0].update(mediaType=None)), "mediaType"),
    "other size": (edit(lambda m: m["layers"][0].update(size=7)), "its manifest says 7"),
    "other digest": (
        edit(lambda m: m["layers"][0].update(digest="sha256:" + "0" * 64)),
        "this blob is missing",
    ),
    "huge": (lambda data: b" " * (5 << 20), "too many for a manifest"),
}


@pytest.mark.parametrize("kind", BAD_MANIFESTS)
def test_a_bad_manifest_is_told_and_the_others_are_not_hidden(store: Store, kind: str) -> None:
    put_model(store.root, "good", "1", [("model", tiny_gguf(2.0))])
    change, message = BAD_MANIFESTS[kind]
    path = manifest_path(store)
    path.write_bytes(change(path.read_bytes()))
    before = files(store.root)
    for attempt in (
        store.show,
        store.path,
        lambda name: store.cp(name, "n"),
        lambda n: store.export(n, store.root / "o"),
    ):
        with pytest.raises(StoreError, match=message):
            attempt("m:1")
    problems = {str(row.name): row.problem for row in store.list()}
    assert problems["good:1"] is None and problems["m:1"]
    found = store.check(repair=True)
    assert {problem.kind for problem in found} & {"manifest", "missing", "size"}
    assert files(store.root).items() >= {k: v for k, v in before.items() if "good" in k or "m/1" in k}.items()
    assert store.show("good:1").path is not None


def test_while_a_manifest_cannot_be_read_no_blob_is_deleted(store: Store) -> None:
    put_model(store.root, "good", "1", [("model", tiny_gguf(2.0))])
    manifest_path(store).write_bytes(b"{")
    blobs = set((store.root / "blobs").iterdir())
    with pytest.warns(AzquantWarning, match="no blob was deleted"):
        assert store.rm("good:1") == []
    assert set((store.root / "blobs").iterdir()) == blobs
    with pytest.warns(AzquantWarning, match="its blobs stay"):
        store.rm("m:1")
    assert [problem.kind for problem in store.check()] == ["unused"] * len(blobs)


# ---- blobs -------------------------------------------------------------------------------------------


def test_a_truncated_blob_is_told_and_made_again(store: Store, tmp_path: Path) -> None:
    path = store.path("m:1")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(StoreError, match=rf"this blob has {len(tiny_gguf()) - 5} bytes, its manifest says"):
        store.path("m:1")
    (problem,) = store.check(repair=True)
    assert (problem.kind, problem.repaired, problem.models) == (
        "size",
        False,
        ("registry.ollama.ai/library/m/1",),
    )
    assert path.exists()
    store.create("again:1", write_gguf_file(tmp_path / "x.gguf"))
    assert store.check() == [] and store.path("m:1").read_bytes() == tiny_gguf()


def test_an_altered_blob_of_the_same_size_is_found(store: Store, tmp_path: Path) -> None:
    path = store.path("m:1")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert [problem.kind for problem in store.check(quick=True)] == []
    assert [problem.kind for problem in store.check()] == ["digest"]
    with pytest.raises(StoreError, match="SHA-256 is another"):
        store.export("m:1", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".azquant-*"))
    store.create("again:1", write_gguf_file(tmp_path / "x.gguf"))
    assert store.check() == []


def test_an_altered_text_layer_is_not_believed(store: Store) -> None:
    path = store.root / "blobs" / digest(b"Hi.").replace(":", "-")
    path.write_bytes(b"Ho.")
    with pytest.raises(StoreError, match="SHA-256 is another"):
        store.show("m:1")


def test_a_text_layer_that_is_no_json_is_told(store: Store) -> None:
    put_model(store.root, "p", "1", [("model", tiny_gguf()), ("params", b"{nope")])
    with pytest.raises(StoreError, match="this layer is not JSON"):
        store.show("p:1")
    put_model(store.root, "p", "1", [("model", tiny_gguf()), ("messages", b'[{"role":"x"}]')])
    with pytest.raises(StoreError, match="no list of role and content"):
        store.show("p:1")


# ---- what a model is made from -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modelfile", "error", "message"),
    [
        ("FROM ./missing.gguf", InputFileError, "there is neither a file .*missing.gguf nor such a model"),
        ("FROM nope:v1", InputFileError, "nor such a model in"),
        ("FROM .", ConversionError, "is a folder; run `azquant convert"),
        ("FROM ./a.gguf\nFROM ./b.gguf", ArgumentError, "must be merged into one file first"),
        ("FROM ./x-*.gguf", ArgumentError, "must be merged"),
        ("FROM ./text.txt", GGUFError, "not a GGUF file"),
        ("FROM ./x.gguf\nADAPTER ./x.gguf", ModelfileError, "is no LoRA adapter"),
        ("FROM x\0y", ArgumentError, "is no path"),
    ],
)
def test_what_cannot_be_a_model_is_refused(
    store: Store, tmp_path: Path, modelfile: str, error: type[AzquantError], message: str
) -> None:
    write_gguf_file(tmp_path / "x.gguf")
    (tmp_path / "text.txt").write_text("This is no model at all, only some text that goes on.")
    (tmp_path / "Modelfile").write_text(modelfile)
    before = files(store.root)
    with pytest.raises(error, match=message) as caught:
        if "\0" in modelfile:
            from azquant.store import Modelfile

            store.create("new", Modelfile(sources=["x\0y"]))
        store.create("new", tmp_path / "Modelfile", modelfile=True)
    assert str(caught.value)
    assert files(store.root) == before, "not even a blob is left"


def test_import_refuses_what_does_not_fit_its_checksums(store: Store, tmp_path: Path) -> None:
    folder = store.export("m:1", tmp_path / "folder")

    def spoiled(change: Callable[[Path], object]) -> Path:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        change(copy)
        return copy

    def altered(copy: Path) -> None:
        data = bytearray((copy / "model.gguf").read_bytes())
        data[-1] ^= 1
        (copy / "model.gguf").write_bytes(data)

    def renamed(copy: Path, name: str) -> None:
        about = json.loads((copy / "model.json").read_text())
        about["files"] = dict.fromkeys(about["files"], name)
        (copy / "model.json").write_text(json.dumps(about))

    def linked(copy: Path) -> None:
        (copy / "model.gguf").unlink()
        (copy / "model.gguf").symlink_to(folder / "model.gguf")

    cases: list[tuple[Callable[[Path], object], str]] = [
        (altered, "model.gguf: its SHA-256 is"),
        (lambda c: (c / "model.gguf").write_bytes(b"GGUF"), "4 bytes instead of"),
        (lambda c: (c / "model.gguf").unlink(), "model.gguf is missing"),
        (linked, "model.gguf is missing or no plain file"),
        (lambda c: (c / "model.json").unlink(), "model.json cannot be read"),
        (lambda c: (c / "model.json").write_text("{"), "not JSON"),
        (lambda c: (c / "model.json").write_text("{}"), "not an exported model"),
        (lambda c: renamed(c, "../../etc/passwd"), "is no digest and file name"),
        (lambda c: renamed(c, "/etc/passwd"), "is no digest and file name"),
        (lambda c: (c / "manifest.json").write_text("{}"), "schemaVersion"),
    ]
    for change, message in cases:
        target = Store(tmp_path / "target")
        with pytest.raises(AzquantError, match=message):
            target.import_(spoiled(change))
        assert target.list() == []
    with pytest.raises(InputFileError, match="is no folder"):
        store.import_(tmp_path / "nothing")
    with pytest.raises(OutputError, match="already exists"):
        store.import_(folder)
    with pytest.raises(OutputError, match="already exists; export into a folder that does not"):
        store.export("m:1", folder)


# ---- no room, no permission --------------------------------------------------------------------------

WITH_LITTLE_ROOM = """
import resource, signal, sys
from azquant.errors import OutputError
from azquant.store import Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
store = Store(sys.argv[1])
for attempt in (lambda: store.create("new:1", sys.argv[2]), lambda: store.export("m:1", sys.argv[3])):
    try:
        attempt()
    except OutputError as error:
        print("cannot be written" in str(error))
"""


def test_without_room_nothing_is_lost_and_nothing_is_left(store: Store, tmp_path: Path) -> None:
    gguf = write_gguf_file(tmp_path / "big.gguf", rows=400)
    store.create("m:2", gguf)  # so that the export has a file over the limit
    manifest_path(store, "m", "2").replace(manifest_path(store))
    other = write_gguf_file(tmp_path / "other.gguf", 3.0, rows=400)
    before = files(tmp_path)
    command = [sys.executable, "-c", WITH_LITTLE_ROOM, str(store.root), str(other), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("True\nTrue\n", "")
    assert files(tmp_path) == before
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_free_space_is_looked_at_first(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = write_gguf_file(tmp_path / "x.gguf", 5.0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    before = files(tmp_path)
    with pytest.raises(OutputError, match=r"needs \d+ bytes; .* has 1 free: nothing was written"):
        store.create("new", gguf)
    with pytest.raises(OutputError, match=r"needs \d+ bytes; .* has 1 free: nothing was written"):
        store.export("m:1", tmp_path / "out")
    assert files(tmp_path) == before


def test_a_store_that_is_no_folder_or_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputFileError, match="is not a folder"):
        Store(tmp_path / "file")
    with pytest.raises(OutputError, match="cannot be written"):
        Store(tmp_path / "file" / "below").create("x", write_gguf_file(tmp_path / "x.gguf"))
    if os.geteuid() != 0:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o555)
        with pytest.raises(OutputError, match="cannot be written: Permission denied"):
            Store(closed).create("x", tmp_path / "x.gguf")


# ---- debris ------------------------------------------------------------------------------------------


def test_repair_removes_debris_and_nothing_else(store: Store) -> None:
    unused = put_blob(store.root, b"nobody refers to this")
    blobs = store.root / "blobs"
    debris = [
        blobs / unused.replace(":", "-"),
        blobs / ".azquant-0123456789abcdef.tmp",
        manifest_path(store).parent / ".azquant-0123456789abcdef.tmp",
        blobs / (".azquant-pull-" + "0" * 64),
    ]
    for path in debris[1:]:
        path.write_bytes(b"half")
    kept = [blobs / ("sha256-" + "1" * 64 + "-partial"), blobs / "notes.txt"]
    for path in kept:
        path.write_bytes(b"Ollama's, or the user's")
    assert sorted(problem.kind for problem in store.check()) == [
        "partial",
        "temporary",
        "temporary",
        "unused",
    ]
    assert all(path.exists() for path in debris)
    assert all(problem.repaired for problem in store.check(repair=True))
    assert not any(path.exists() for path in debris) and all(path.exists() for path in kept)
    assert store.check() == [] and store.show("m:1").system == "Hi." and (store.root / LOCK).exists()
