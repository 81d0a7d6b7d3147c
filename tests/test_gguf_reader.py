"""Reading GGUF files: those of the gguf package, those built by hand, and real ones."""

from __future__ import annotations

import gc
import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_builder import ARRAY, BOOL, F32, F64, I8, I16, I32, I64, STRING, U8, U16, U32, U64, info, pair, text
from gguf_builder import array as packed_array
from gguf_builder import gguf as build

from azquant.errors import ArgumentError, GGUFError, InputFileError, UnsupportedTypeError
from azquant.gguf import GGUFArray, ValueType, open_gguf
from azquant.types import get_type

NUMBERS = [
    (U8, "B", 0xFE),
    (I8, "b", -2),
    (U16, "H", 0xFEDC),
    (I16, "h", -300),
    (U32, "I", 0xFEDCBA98),
    (I32, "i", -70000),
    (F32, "f", 0.15625),
    (U64, "Q", 0xFEDCBA9876543210),
    (I64, "q", -(2**62)),
    (F64, "d", 1e-300),
]


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """Writes bytes to a file and gives its path."""

    def save(content: bytes) -> Path:
        path = tmp_path / "file.gguf"
        path.write_bytes(content)
        return path

    return save


def rich_file(order: str = "<", version: int = 3) -> bytes:
    """Every value type, scalar and in an array, and two tensors."""
    pairs = []
    for kind, letter, number in NUMBERS:
        pairs.append(pair(f"one.{letter}", kind, struct.pack(order + letter, number), order))
        many = struct.pack(f"{order}3{letter}", number, 0, number)
        pairs.append(pair(f"many.{letter}", ARRAY, packed_array(kind, 3, many, order), order))
    pairs.append(pair("yes", BOOL, b"\x01", order))
    pairs.append(pair("bools", ARRAY, packed_array(BOOL, 3, b"\x01\x00\x01", order), order))
    pairs.append(pair("name", STRING, text("Azərbaycan", order), order))
    words = b"".join(text(word, order) for word in ("ə", "", "three"))
    pairs.append(pair("words", ARRAY, packed_array(STRING, 3, words, order), order))
    inner = packed_array(U8, 2, b"\x01\x02", order) + packed_array(STRING, 1, text("x", order), order)
    pairs.append(pair("nested", ARRAY, packed_array(ARRAY, 2, inner, order), order))
    infos = [info("a", [32, 2], 2, 0, order), info("b", [3], 0, 64, order)]
    data = bytes(range(36)) + bytes(28) + struct.pack(order + "3f", 1, 2, 3)
    return build(pairs, infos, data, order=order, version=version)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("version", [2, 3])
def test_all_value_types_in_both_byte_orders(saved: Any, order: str, version: int) -> None:
    with open_gguf(saved(rich_file(order, version))) as file:
        assert (file.version, file.byte_order, file.alignment) == (version, order, 32)
        for kind, letter, number in NUMBERS:
            assert file.metadata[f"one.{letter}"] == number
            assert file.metadata_types[f"one.{letter}"] == kind
            many = file.metadata[f"many.{letter}"]
            assert isinstance(many, GGUFArray)
            assert many.element_type == kind
            assert many.tolist() == [number, 0, number]
            assert many.to_numpy().tolist() == [number, 0, number]
        assert file.metadata["yes"] is True
        assert file.metadata["bools"].tolist() == [True, False, True]
        assert file.metadata["bools"].to_numpy().dtype == bool
        assert file.metadata["name"] == "Azərbaycan"
        assert file.metadata["words"].tolist() == ["ə", "", "three"]
        assert file.metadata["nested"].tolist() == [[1, 2], ["x"]]
        assert list(file.metadata)[:2] == ["one.B", "many.B"]
        assert list(file.tensors) == ["a", "b"]


def test_tensors_are_read_only_views(saved: Any) -> None:
    content = rich_file()
    with open_gguf(saved(content)) as file:
        a, b = file.tensors["a"], file.tensors["b"]
        assert (a.shape, a.type, a.nbytes, a.offset) == ((2, 32), get_type("q4_0"), 36, file.data_offset)
        assert a.data.tobytes() == content[a.offset : a.offset + 36] == bytes(range(36))
        assert b.data.view("<f4").tolist() == [1, 2, 3]
        assert np.shares_memory(a.data, a.data)
        with pytest.raises(ValueError, match="read-only"):
            a.data[0] = 1


def test_what_was_taken_outlives_the_file(saved: Any) -> None:
    with open_gguf(saved(rich_file())) as file:
        view, words, metadata, tensor = (
            file.tensors["a"].data,
            file.metadata["words"],
            file.metadata,
            file.tensors["b"],
        )
    assert file.closed
    for name in ("metadata", "metadata_types", "tensors"):
        with pytest.raises(ArgumentError, match="closed"):
            getattr(file, name)
    file.close()
    del file
    gc.collect()
    assert view.tobytes() == bytes(range(36))
    assert words[2] == "three"
    assert metadata["name"] == "Azərbaycan"
    assert tensor.data.size == 12


@pytest.mark.parametrize("key", ["words", "many.H", "bools", "nested"])
def test_arrays_behave_as_sequences(saved: Any, key: str) -> None:
    with open_gguf(saved(rich_file())) as file:
        items = file.metadata[key]
        everything = items.tolist()

        def plain(item: Any) -> Any:
            return item.tolist() if isinstance(item, GGUFArray) else item

        assert len(items) == len(everything)
        assert [plain(item) for item in items] == everything
        assert [plain(items[i]) for i in range(-len(items), len(items))] == everything * 2
        assert [plain(item) for item in items[::-1]] == everything[::-1]
        assert [plain(item) for item in items[1:]] == everything[1:]
        assert items[5:] == []
        for outside in (len(items), -len(items) - 1):
            with pytest.raises(IndexError):
                items[outside]
    if key in ("words", "nested"):
        with pytest.raises(TypeError, match="tolist"):
            items.to_numpy()


def test_broken_utf8_in_a_value_is_kept(saved: Any) -> None:
    raw = b"\xff\xfeok\xed\xa0\x80"
    pairs = [
        pair("s", STRING, text(raw)),
        pair("t", ARRAY, packed_array(STRING, 1, text(raw))),
    ]
    with open_gguf(saved(build(pairs))) as file:
        for value in (file.metadata["s"], file.metadata["t"][0]):
            assert value.encode("utf-8", "surrogateescape") == raw


def test_any_bool_but_zero_is_true(saved: Any) -> None:
    with open_gguf(saved(build([pair("a", BOOL, b"\x02"), pair("b", BOOL, b"\x00")]))) as file:
        assert [file.metadata["a"], file.metadata["b"]] == [True, False]
        assert file.copy_metadata()["a"].encoded == b"\x02"


def test_no_keys_no_tensors(saved: Any) -> None:
    with open_gguf(saved(build(data=None))) as file:
        assert (len(file.metadata), len(file.tensors)) == (0, 0)


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_alignment_is_honoured(saved: Any, alignment: int) -> None:
    pairs = [pair("general.alignment", U32, struct.pack("<I", alignment))]
    infos = [info("a", [3]), info("b", [3], 0, -(-12 // alignment) * alignment)]
    data = struct.pack("<3f", 1, 2, 3)
    data += bytes(-len(data) % alignment) + struct.pack("<3f", 4, 5, 6)
    with open_gguf(saved(build(pairs, infos, data, alignment=alignment))) as file:
        assert file.alignment == alignment
        assert file.data_offset % alignment == 0
        assert file.tensors["b"].data.view("<f4").tolist() == [4, 5, 6]


def test_odd_but_legal_layouts(saved: Any) -> None:
    """Tensors out of order, a gap between them, none of them long, bytes after the last."""
    infos = [info("z", [2], 0, 96), info("scalar", [], 0, 32), info("empty", [32, 0], 2, 0)]
    content = build([], infos, bytes(32) + b"\x00\x00\x80\x3f" + bytes(60) + bytes(8) + b"more")
    with open_gguf(saved(content)) as file:
        assert list(file.tensors) == ["z", "scalar", "empty"]
        assert file.tensors["scalar"].shape == ()
        assert file.tensors["scalar"].data.view("<f4") == [1.0]
        assert (file.tensors["empty"].shape, file.tensors["empty"].data.size) == ((0, 32), 0)
        assert file.has_data


def test_a_file_of_header_only_opens_without_data(saved: Any) -> None:
    content = build([pair("k", U8, b"\x07")], [info("a", [8]), info("e", [0], 0, 32)])
    with open_gguf(saved(content)) as file:
        assert not file.has_data
        assert file.metadata["k"] == 7
        assert file.tensors["a"].nbytes == 32
        assert file.tensors["e"].data.size == 0
        with pytest.raises(GGUFError, match="'a' has no data") as caught:
            _ = file.tensors["a"].data
        assert caught.value.offset == file.data_offset


@pytest.mark.parametrize("endian", [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG])
def test_reads_what_the_gguf_package_writes(tmp_path: Path, endian: gguf.GGUFEndian) -> None:
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "gpt2", endianess=endian)
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -32768)
    writer.add_uint32("u32", 2**32 - 1)
    writer.add_int32("i32", -(2**31))
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("bool", True)
    writer.add_string("string", "İstanbul ığüşöç")
    writer.add_array("tokens", ["a", "ə", "<|end|>"])
    writer.add_array("types", [1, 2, 3])
    writer.add_array("scores", [0.5, -1.5])
    weights = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    halves = np.arange(64, dtype=np.float16).reshape(2, 32)
    blocks = gguf.quantize(
        np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64), gguf.GGMLQuantizationType.Q4_0
    )
    writer.add_tensor("weights", weights.copy())
    writer.add_tensor("halves", halves.copy())
    writer.add_tensor("blocks", blocks.copy(), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with open_gguf(path) as file:
        plain = {k: v.tolist() if isinstance(v, GGUFArray) else v for k, v in file.metadata.items()}
        assert plain == {
            "general.architecture": "gpt2",
            "u8": 255,
            "i8": -128,
            "u16": 65535,
            "i16": -32768,
            "u32": 2**32 - 1,
            "i32": -(2**31),
            "u64": 2**64 - 1,
            "i64": -(2**63),
            "f32": 0.5,
            "f64": 0.1,
            "bool": True,
            "string": "İstanbul ığüşöç",
            "tokens": ["a", "ə", "<|end|>"],
            "types": [1, 2, 3],
            "scores": [0.5, -1.5],
        }
        order = file.byte_order
        assert order == ("<" if endian is gguf.GGUFEndian.LITTLE else ">")
        found = file.tensors["weights"]
        assert found.shape == (2, 3, 4)
        assert np.array_equal(found.data.view("<f4").reshape(found.shape), weights)
        assert np.array_equal(found.raw.view(order + "f4").reshape(found.shape), weights)
        assert np.array_equal(file.tensors["halves"].data.view("<f2").reshape(2, 32), halves)
        assert (file.tensors["blocks"].shape, file.tensors["blocks"].type.name) == ((2, 64), "q4_0")
        if order == "<":
            assert file.tensors["blocks"].data.tobytes() == blocks.tobytes()


def test_reads_real_files_as_the_gguf_package_does(shared_data: Path) -> None:
    for name in (
        "vocab/ggml-vocab-gpt-2.gguf",
        "vocab/ggml-vocab-llama-spm.gguf",
        "stories260K/stories260K-F32.gguf",
    ):
        path = shared_data / name
        theirs = gguf.GGUFReader(path)
        with open_gguf(path) as ours:
            fields = {k: v for k, v in theirs.fields.items() if not k.startswith("GGUF.")}
            assert list(ours.metadata) == list(fields)
            for key, field in fields.items():
                value = ours.metadata[key]
                if isinstance(value, GGUFArray) and len(value) > 5000:
                    assert value[:50] == [field.contents(i) for i in range(50)]
                    assert value[-1] == field.contents(len(value) - 1)
                    continue
                assert (value.tolist() if isinstance(value, GGUFArray) else value) == field.contents()
                assert ours.metadata_types[key] == field.types[0]
            assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
            for tensor in theirs.tensors:
                mine = ours.tensors[tensor.name]
                assert mine.shape == tuple(int(d) for d in reversed(tensor.shape))
                assert (mine.offset, mine.nbytes) == (tensor.data_offset, tensor.n_bytes)
                assert mine.data.tobytes() == tensor.data.tobytes()


def test_missing_and_unreadable(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, reason in [
        (tmp_path / "none.gguf", "does not exist"),
        (tmp_path, "folder"),
        (pipe, "not a file"),  # and does not wait for a writer
        ("nul\0.gguf", "cannot be read"),
        (tmp_path / ("x" * 300), "cannot be read"),
    ]:
        with pytest.raises(InputFileError, match=reason):
            open_gguf(path)


def test_value_types_know_their_size() -> None:
    assert [kind.size for kind in ValueType] == [1, 1, 2, 2, 4, 4, 4, 1, None, None, 8, 8, 8]
    assert [int(kind) for kind in ValueType] == [int(kind) for kind in gguf.GGUFValueType]


def test_repr_is_short(saved: Any) -> None:
    with open_gguf(saved(rich_file())) as file:
        assert repr(file.metadata["words"]) == "<GGUFArray of 3 STRING>"
        assert "2 tensors" in repr(file)
        assert "array(" not in repr(file.tensors["a"])
    assert "closed" in repr(file)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize(("kind", "letter"), [(0, "f"), (26, "i"), (28, "d"), (24, "b")])
def test_big_endian_data_come_little_endian(saved: Any, kind: int, letter: str, count: int) -> None:
    """One element too, which turned round in place would not be contiguous: a finding of the fuzzer."""
    numbers = [3, -7][:count]
    data = struct.pack(f">{count}{letter}", *numbers) + bytes(32)
    with open_gguf(saved(build([], [info("a", [count], kind, 0, ">")], data, order=">"))) as file:
        found = file.tensors["a"].data
        assert found.flags.c_contiguous
        assert found.view(np.dtype(letter).newbyteorder("<")).tolist() == numbers


def test_big_endian_blocks_that_are_not_known_are_refused(saved: Any) -> None:
    with open_gguf(saved(build([], [info("a", [256], 16, 0, ">")], bytes(96), order=">"))) as file:
        assert file.tensors["a"].raw.size == 66
        with pytest.raises(UnsupportedTypeError, match="tensor 'a': iq2_xxs data of big-endian"):
            _ = file.tensors["a"].data
