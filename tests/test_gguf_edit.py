"""Editing metadata: what changes, what must not, and that the old file or the new one is always there."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_builder import ARRAY, BOOL, F32, STRING, U16, U32, array, info, pair, text
from gguf_builder import gguf as build

from azquant.errors import ArgumentError, AzquantError, GGUFError, OutputError
from azquant.gguf import GGUFArray, ValueType, edit_gguf, edited_metadata, keys, open_gguf, split_gguf
from azquant.gguf.atomic import AtomicFile

ODD = [
    pair("odd.text", STRING, text(b"\xff\xed\xa0\x80")),
    pair("odd.bool", BOOL, b"\2"),
    pair("odd.nan", F32, b"\x01\x00\x80\x7f"),
    pair("odd.nested", ARRAY, array(ARRAY, 1, array(STRING, 1, text(b"\xc3")))),
]
PAIRS = [
    pair("general.name", STRING, text("old")),
    *ODD,
    pair("n", U16, b"\7\0"),
    pair("words", ARRAY, array(STRING, 2, text("a") + text("b"))),
]
INFOS = [info("q", [256], 14), info("w", [3], 0, 224)]  # q6_k: a type with no decoder
DATA = bytes(range(210)) + bytes(14) + struct.pack("<3f", 1, 2, 3) + bytes(20)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.gguf"
    path.write_bytes(build(PAIRS, INFOS, DATA))
    return path


def changed(*pairs: bytes) -> bytes:
    return build(pairs, INFOS, DATA)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ({}, changed(*PAIRS)),
        ({"values": {"general.name": "ə"}}, changed(pair("general.name", STRING, text("ə")), *PAIRS[1:])),
        ({"values": {"n": 65535}}, changed(*PAIRS[:5], pair("n", U16, b"\xff\xff"), PAIRS[6])),
        (
            {"values": {"words": ["c"]}},
            changed(*PAIRS[:6], pair("words", ARRAY, array(STRING, 1, text("c")))),
        ),
        ({"values": {"n": keys.f32(1)}}, changed(*PAIRS[:5], pair("n", F32, b"\0\0\x80?"), PAIRS[6])),
        ({"values": {"new": keys.u32(9)}}, changed(*PAIRS, pair("new", U32, b"\t\0\0\0"))),
        ({"remove": ["general.name", "words"]}, changed(*PAIRS[1:6])),
        ({"remove": ["n"], "values": {"n": keys.u16(7)}}, changed(*PAIRS[:5], PAIRS[6], PAIRS[5])),
    ],
    ids=["nothing", "text", "number", "array", "another type", "new", "remove", "remove and set"],
)
def test_the_rest_is_the_same_bit_by_bit(source: Path, edit: dict[str, Any], expected: bytes) -> None:
    edit_gguf(source, source.parent / "out.gguf", **edit)
    assert (source.parent / "out.gguf").read_bytes() == expected
    assert source.read_bytes() == build(PAIRS, INFOS, DATA)
    edit_gguf(source, **edit)
    assert source.read_bytes() == expected
    assert len(list(source.parent.iterdir())) == 2


def test_the_gguf_package_reads_the_edited_file(tmp_path: Path) -> None:
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.context_length", 64)
    writer.add_array("tokenizer.ggml.tokens", ["a", "ə"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    edit_gguf(path, values={"llama.context_length": 128, "my.key": keys.string("Şəki")})
    fields = gguf.GGUFReader(path).fields
    assert fields["llama.context_length"].contents() == 128
    assert fields["llama.context_length"].types == [gguf.GGUFValueType.UINT32]
    assert fields["my.key"].contents() == "Şəki"
    assert fields["tokenizer.ggml.tokens"].contents() == ["a", "ə"]


def test_alignment_may_be_edited(source: Path) -> None:
    edit_gguf(source, values={"general.alignment": keys.u32(256)})
    with open_gguf(source) as file:
        assert file.alignment == 256
        assert file.tensors["w"].data.tobytes() == struct.pack("<3f", 1, 2, 3)
    edit_gguf(source, remove=["general.alignment"])
    assert source.read_bytes() == build(PAIRS, INFOS, DATA)


def test_a_big_endian_file_becomes_little_endian(tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    blocks = b"\x3c\x00" + bytes(range(16))
    halves = bytes.fromhex("3c00 4000")
    data = struct.pack(">2f", 1.5, -2) + bytes(24) + blocks + bytes(14) + halves
    infos = [
        info("f", [2], 0, 0, ">"),
        info("q", [32], 2, 32, ">"),
        info("h", [2], 1, 64, ">"),
    ]
    path.write_bytes(build([pair("n", U16, b"\0\7", ">")], infos, data, order=">"))
    edit_gguf(path, values={"n": 8})
    with open_gguf(path) as file:
        assert (file.byte_order, file.metadata["n"]) == ("<", 8)
        assert file.tensors["f"].data.tobytes() == struct.pack("<2f", 1.5, -2)
        assert file.tensors["q"].data.tobytes() == b"\x00\x3c" + bytes(range(16))
        assert file.tensors["h"].data.tobytes() == bytes.fromhex("003c 0040")


def test_a_shard_may_be_edited(source: Path) -> None:
    shards = split_gguf(source, source.parent / "cut", max_tensors=1)
    edit_gguf(shards[0], values={"general.name": "new"})
    with open_gguf(shards[0]) as file:
        assert file.metadata["general.name"] == "new"
        assert list(file.tensors) == ["q", "w"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"remove": ["general.nam"]}, r"no key 'general.nam' \(is 'general.name' meant\?\)"),
        ({"remove": ["n", "n"]}, "no key 'n'"),
        ({"values": {"new": 5}}, "a new key needs a typed value"),
        ({"values": {"n": -1}}, "key 'n': -1 is outside|key 'n': int -1 is outside"),
        ({"values": {"n": "7"}}, "key 'n': UINT16 takes a number"),
        ({"values": {"words": "c"}}, "key 'words': an array takes a sequence"),
        ({"values": {"general.name": 5}}, "key 'general.name': a STRING takes a str"),
        ({"values": {"": keys.u8(1)}}, "key"),
        ({"values": {"general.alignment": keys.u32(3)}}, "alignment 3"),
        ({"values": {"general.alignment": keys.string("3")}}, "STRING; it must be UINT32"),
    ],
)
def test_refused_without_a_trace(source: Path, edit: dict[str, Any], message: str) -> None:
    before = source.read_bytes()
    for destination in (None, source.parent / "out.gguf"):
        with pytest.raises(ArgumentError, match=message):
            edit_gguf(source, destination, **edit)
    assert source.read_bytes() == before
    assert list(source.parent.iterdir()) == [source]


def test_header_only_files_have_no_data_to_copy(tmp_path: Path) -> None:
    path = tmp_path / "head.gguf"
    path.write_bytes(build(PAIRS, INFOS, b""))
    with pytest.raises(GGUFError, match="header only"):
        edit_gguf(path, values={"n": 1})
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("link", ["same", "symbolic", "hard"])
def test_in_place_through_links(source: Path, link: str) -> None:
    """The file that is named is replaced in one step; a hard link keeps the old one."""
    before = source.read_bytes()
    other = source
    if link == "symbolic":
        other = source.parent / "link.gguf"
        other.symlink_to(source)
    elif link == "hard":
        other = source.parent / "link.gguf"
        other.hardlink_to(source)
    with pytest.raises(OutputError, match="same file as the input"):
        edit_gguf(source, other, values={"n": 1})
    assert source.read_bytes() == before
    edit_gguf(source, other, values={"n": 1}, overwrite=True)
    with open_gguf(other) as file:
        assert file.metadata["n"] == 1
    assert other.is_symlink() == (link == "symbolic")
    assert (source.read_bytes() == before) == (link == "hard")
    assert len(list(source.parent.iterdir())) == (1 if link == "same" else 2)


def test_a_failure_keeps_the_old_file(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = source.read_bytes()
    for method in ("write", "sync", "publish"):
        with monkeypatch.context() as patch:

            def failing(self: AtomicFile, *arguments: Any) -> None:
                raise OutputError("the disk is full")

            patch.setattr(AtomicFile, method, failing)
            with pytest.raises(AzquantError, match="full"):
                edit_gguf(source, values={"n": 1})
    assert source.read_bytes() == before
    assert list(source.parent.iterdir()) == [source]


def test_what_would_be_written_can_be_seen(source: Path) -> None:
    with open_gguf(source) as file:
        metadata = edited_metadata(file, {"n": 1, "x": keys.array(ValueType.INT8, [1])}, ["words"])
        assert list(metadata) == [
            "general.name",
            *("odd." + n for n in ("text", "bool", "nan", "nested")),
            "n",
            "x",
        ]
        assert metadata["n"] == keys.u16(1)
        assert isinstance(file.metadata["words"], GGUFArray)
