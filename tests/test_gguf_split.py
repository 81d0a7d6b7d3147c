"""Split models: cut, joined and merged; the shards that ggml and the gguf package make and read; refusals."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from convert_support import llama_cpp
from gguf_builder import I32, STRING, U16, U32, info, pair, text
from gguf_builder import gguf as build

from azquant.errors import ArgumentError, AzquantError, GGUFError, InputFileError, OutputError
from azquant.gguf import TensorSpec, atomic, keys, merge_gguf, open_gguf, split_gguf, write_gguf
from azquant.types import get_type

COUNT = 7


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A file of seven tensors of different sizes and types, one of them empty."""
    rng = np.random.default_rng(1)
    specs = [TensorSpec(f"t{i}", (i, 32), get_type("q4_0" if i % 2 else "f32")) for i in range(COUNT)]
    metadata = {
        keys.ARCHITECTURE: keys.string("gpt2"),
        keys.ALIGNMENT: keys.u32(64),
        "words": keys.array(keys.string("x").type, ["ə", "", "c"]),
    }
    path = tmp_path / "whole.gguf"
    write_gguf(path, metadata, specs, lambda spec: [rng.bytes(spec.nbytes)], alignment=64)
    return path


def contents(path: Path, **options: Any) -> dict[str, tuple[tuple[int, ...], str, bytes]]:
    with open_gguf(path, **options) as file:
        return {t.name: (t.shape, t.type.name, t.data.tobytes()) for t in file.tensors.values()}


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({"max_tensors": 3}, [3, 3, 1]),
        ({"max_tensors": 1}, [1] * COUNT),
        ({"max_bytes": 256}, [2, 1, 1, 1, 1, 1]),  # 0 + 64, 256, 64, 512, 128, 768 bytes
        ({"max_bytes": 1 << 30}, [COUNT]),
        ({"max_tensors": 4, "max_bytes": 1 << 30, "metadata_first": True}, [0, 4, 3]),
        ({}, [COUNT]),
    ],
)
def test_cut_and_joined_again(whole: Path, options: dict[str, Any], groups: list[int]) -> None:
    shards = split_gguf(whole, whole.parent / "cut", **options)
    assert [path.name for path in shards] == [
        f"cut-{i + 1:05}-of-{len(groups):05}.gguf" for i in range(len(groups))
    ]
    assert [len(contents(path, join=False)) for path in shards] == groups
    assert contents(shards[0]) == contents(whole)
    with open_gguf(shards[0]) as file, open_gguf(whole) as source:
        assert file.paths == (tuple(shards) if len(groups) > 1 else (shards[0],))
        if len(groups) > 1:
            assert file.copy_metadata() == source.copy_metadata()
            assert file.size == sum(path.stat().st_size for path in shards)
            assert {tensor.path for tensor in file.tensors.values()} <= set(shards)
    merged = whole.parent / "merged.gguf"
    merge_gguf(shards[0], merged)
    assert merged.read_bytes() == whole.read_bytes()
    again = split_gguf(shards[0], whole.parent / "again", max_tensors=2)
    assert contents(again[0]) == contents(whole)


def test_keys_are_those_of_llama_cpp(whole: Path) -> None:
    shards = split_gguf(whole, whole.parent / "cut", max_tensors=4)
    for number, path in enumerate(shards):
        reader = gguf.GGUFReader(path)
        fields = {key: field for key, field in reader.fields.items() if key.startswith("split.")}
        assert {key: (field.contents(), field.types[0].name) for key, field in fields.items()} == {
            "split.no": (number, "UINT16"),
            "split.count": (2, "UINT16"),
            "split.tensors.count": (COUNT, "INT32"),
        }


def test_reads_shards_of_the_gguf_package(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama", split_max_tensors=2)
    arrays = {f"t{i}": np.arange(8, dtype=np.float32) + i for i in range(5)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.add_string("general.name", "ə")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(tmp_path / "theirs-00001-of-00003.gguf") as file:
        assert len(file.paths) == 3
        assert file.metadata["general.name"] == "ə"
        assert not any(key.startswith("split.") for key in file.metadata)
        assert {t.name: t.data.view("<f4").tolist() for t in file.tensors.values()} == {
            name: array.tolist() for name, array in arrays.items()
        }


def test_ggml_loads_our_shards_and_the_text_is_the_same(shared_data: Path, tmp_path: Path) -> None:
    """xllamacpp generates the same text from a real model, from our shards of it, and from them merged."""
    source = shared_data / "stories260K/stories260K-F32.gguf"
    shards = split_gguf(source, tmp_path / "stories", max_tensors=20)
    assert len(shards) == 3
    merged = tmp_path / "merged.gguf"
    merge_gguf(shards[0], merged)
    request = {"prompt": "Once upon a time", "n_predict": 24}
    texts = [llama_cpp(path, request)[0]["content"] for path in (source, shards[0], merged)]
    assert len(texts[0]) > 40
    assert texts[0] == texts[1] == texts[2]


# Refusals


def shard(number: int = 1, count: int = 2, tensors: int = 2, name: str = "b", *more: bytes) -> bytes:
    pairs = [
        pair("split.no", U16, struct.pack("<H", number)),
        pair("split.count", U16, struct.pack("<H", count)),
        pair("split.tensors.count", I32, struct.pack("<i", tensors)),
        *more,
    ]
    return build(pairs, [info(name, [8])], bytes(32))


FIRST = shard(0, 2, 2, "a", pair("general.name", STRING, text("x")))
SECOND = "m-00002-of-00002.gguf"

REFUSED: dict[str, tuple[bytes, bytes | None, str, str]] = {
    # first shard, second, what is said, the file it is said of
    "missing": (FIRST, None, "shard 2 of 2 of .*does not exist", SECOND),
    "no GGUF": (FIRST, b"version https://git-lfs", "git lfs pull", SECOND),
    "no shard": (FIRST, build([], [info("b", [8])], bytes(32)), "no shard of a model", SECOND),
    "another place": (FIRST, shard(0), "shard 1 of 2 with 2 tensors", SECOND),
    "another count": (FIRST, shard(1, 3), "shard 2 of 3", SECOND),
    "another total": (FIRST, shard(1, 2, 9), "with 9 tensors together; its name", SECOND),
    "the same tensor": (FIRST, shard(1, 2, 2, "a"), "'a' is in an earlier shard", SECOND),
    "another value": (
        FIRST,
        shard(1, 2, 2, "b", pair("general.name", STRING, text("y"))),
        "'general.name' has another value",
        SECOND,
    ),
    "too few": (shard(0, 2, 3, "a"), shard(1, 2, 3), "announces 3 tensors; the 2 shards hold 2", "m-00001"),
    "cut short": (FIRST, shard()[:-1], "cut short", SECOND),
    "big-endian": (
        FIRST,
        build(
            [
                pair("split.no", U16, b"\0\1", ">"),
                pair("split.count", U16, b"\0\2", ">"),
                pair("split.tensors.count", I32, b"\0\0\0\2", ">"),
            ],
            [info("b", [8], order=">")],
            bytes(32),
            order=">",
        ),
        "byte order",
        SECOND,
    ),
    "65535 shards": (shard(0, 65535, 2, "a"), None, "not named ...-00001-of-65535", "m-00001"),
    "number too large": (shard(7, 2, 2, "a"), None, "split.no is 7 of 2", "m-00001"),
    "no number": (
        build([pair("split.count", U16, b"\2\0")], [info("a", [8])], bytes(32)),
        None,
        "split.no is missing",
        "m-00001",
    ),
    "count of another type": (
        build([pair("split.count", STRING, text("2"))], [info("a", [8])], bytes(32)),
        None,
        "split.count is of type STRING",
        "m-00001",
    ),
    "negative": (
        build([pair("split.count", I32, b"\xff" * 4), pair("split.no", U32, bytes(4))], [], b""),
        None,
        "split.count is -1",
        "m-00001",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    first, second, message, where = REFUSED[name]
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(first)
    if second is not None:
        (tmp_path / SECOND).write_bytes(second)
    with pytest.raises(InputFileError if second is None and name == "missing" else GGUFError) as caught:
        open_gguf(path)
    assert caught.match(message)
    assert str(tmp_path / where) in str(caught.value)
    open_gguf(path, join=False).close()


def test_a_later_shard_names_the_first(tmp_path: Path) -> None:
    path = tmp_path / SECOND
    path.write_bytes(shard())
    with pytest.raises(GGUFError, match=r"shard 2 of 2; open the first, m-00001-of-00002\.gguf"):
        open_gguf(path)
    with open_gguf(path, join=False) as file:
        assert file.metadata["split.no"] == 1


def test_a_renamed_shard_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "renamed.gguf"
    path.write_bytes(FIRST)
    with pytest.raises(GGUFError, match="not named"):
        open_gguf(path)


def test_shards_through_links_are_found_beside_the_link(whole: Path) -> None:
    """As the cache of the Hugging Face Hub keeps them."""
    shards = split_gguf(whole, whole.parent / "cut", max_tensors=4)
    folder = whole.parent / "links"
    folder.mkdir()
    for number, path in enumerate(shards):
        blob = path.rename(whole.parent / f"blob{number}")
        (folder / path.name).symlink_to(blob)
    assert contents(folder / shards[0].name) == contents(whole)


@pytest.mark.parametrize(
    ("attempt", "kind", "message"),
    [
        (lambda p: split_gguf(p, p.parent / "x", max_tensors=0), ArgumentError, "max_tensors is 0"),
        (lambda p: split_gguf(p, p.parent / "x", max_bytes=-1), ArgumentError, "max_bytes is -1"),
        (lambda p: merge_gguf(p, p.parent / "x"), ArgumentError, "nothing to merge"),
        (lambda p: split_gguf(p, p.parent / "gone" / "x"), OutputError, "no folder"),
    ],
)
def test_wrong_arguments(
    whole: Path, attempt: Callable[[Path], Any], kind: type[AzquantError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        attempt(whole)
    assert list(whole.parent.iterdir()) == [whole]


def test_inputs_are_never_replaced(whole: Path) -> None:
    shards = split_gguf(whole, whole.parent / "cut", max_tensors=4)
    before = [path.read_bytes() for path in shards]
    with pytest.raises(OutputError, match="same file as the input"):
        merge_gguf(shards[0], shards[1], overwrite=True)
    with pytest.raises(OutputError, match="same file as the input"):
        split_gguf(shards[0], whole.parent / "cut", max_tensors=4, overwrite=True)
    with pytest.raises(OutputError, match="already exists"):
        split_gguf(whole, whole.parent / "cut", max_tensors=4)
    assert [path.read_bytes() for path in shards] == before


@pytest.mark.parametrize("nth", [0, 1, 2])
@pytest.mark.parametrize("method", ["write", "sync", "publish"])
def test_all_shards_or_none(whole: Path, monkeypatch: pytest.MonkeyPatch, method: str, nth: int) -> None:
    original = getattr(atomic.AtomicFile, method)
    seen: list[atomic.AtomicFile] = []

    def failing(self: atomic.AtomicFile, *arguments: Any) -> None:
        if self not in seen:
            seen.append(self)
        if seen.index(self) == nth:
            raise OutputError("the disk is full")
        original(self, *arguments)

    monkeypatch.setattr(atomic.AtomicFile, method, failing)
    with pytest.raises(OutputError, match="full"):
        split_gguf(whole, whole.parent / "cut", max_tensors=3)
    assert list(whole.parent.iterdir()) == [whole]
