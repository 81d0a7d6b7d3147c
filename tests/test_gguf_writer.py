"""Writing GGUF files: read back by the gguf package, by ggml and by us; and nothing but whole files, ever."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import struct
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_builder import ARRAY, F32, STRING, array, info, pair, text
from gguf_builder import gguf as build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from azquant.errors import ArgumentError, OutputError, ShapeError
from azquant.gguf import (
    GGUFArray,
    MetadataValue,
    TensorSpec,
    ValueType,
    atomic,
    check_output,
    fill,
    keys,
    open_gguf,
    write_gguf,
)
from azquant.types import get_type

ROOT = Path(__file__).resolve().parent.parent
F32_TYPE, Q4_0 = get_type("f32"), get_type("q4_0")
ONE = TensorSpec("one", (3,), F32_TYPE)
ONE_BYTES = struct.pack("<3f", 1, 2, 3)


def give_one(spec: TensorSpec) -> list[bytes]:
    return [ONE_BYTES]


@pytest.fixture(params=["unnamed", "named"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kinds of temporary file."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    elif not hasattr(os, "O_TMPFILE"):
        pytest.skip("no O_TMPFILE here")
    return str(request.param)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """A path in a folder of its own, which must hold nothing else afterwards."""
    folder = tmp_path / "folder"
    folder.mkdir()
    yield folder / "out.gguf"
    assert {path.name for path in folder.iterdir()} <= {"out.gguf"}


def plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.tolist() if isinstance(value, GGUFArray) else value for key, value in metadata.items()}


# Round trips


def test_the_gguf_package_reads_it(target: Path) -> None:
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((6, 64), dtype=np.float32)
    blocks = gguf.quantize(weights, gguf.GGMLQuantizationType.Q4_0)
    cube = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
    metadata = {
        keys.ARCHITECTURE: keys.string("gpt2"),
        "u8": keys.u8(255),
        "i8": keys.i8(-128),
        "u16": keys.u16(65535),
        "i16": keys.i16(-32768),
        "u32": keys.u32(2**32 - 1),
        "i32": keys.i32(-(2**31)),
        "u64": keys.u64(2**64 - 1),
        "i64": keys.i64(-(2**63)),
        "f32": keys.f32(0.5),
        "f64": keys.f64(0.1),
        "yes": keys.boolean(True),
        "name": keys.string("Şəki ığüşöç"),
        "tokens": keys.array(ValueType.STRING, ["a", "", "ə"]),
        "scores": keys.array(ValueType.FLOAT32, [0.5, -1]),
        "types": keys.array(ValueType.INT32, np.array([1, 2, 3])),
        "flags": keys.array(ValueType.BOOL, [True, False]),
    }
    specs = [
        TensorSpec("blocks", weights.shape, Q4_0),
        TensorSpec("cube", cube.shape, get_type("f16")),
        TensorSpec("weights", weights.shape, F32_TYPE),
    ]
    contents = {"blocks": blocks, "cube": cube, "weights": weights}
    write_gguf(target, metadata, specs, lambda spec: [contents[spec.name]])

    reader = gguf.GGUFReader(target)
    fields = {k: v.contents() for k, v in reader.fields.items() if not k.startswith("GGUF.")}
    assert fields == plain({k: v.value for k, v in metadata.items()}) | {
        "tokens": ["a", "", "ə"],
        "scores": [0.5, -1],
        "types": [1, 2, 3],
        "flags": [True, False],
    }
    assert [tensor.name for tensor in reader.tensors] == ["blocks", "cube", "weights"]
    assert np.array_equal(reader.tensors[0].data, blocks)
    assert np.array_equal(reader.tensors[1].data, cube)
    assert np.array_equal(reader.tensors[2].data, weights)
    assert target.stat().st_size % 32 == 0


def test_ggml_reads_it(target: Path) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    ggml = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))

    class Parameters(ctypes.Structure):
        _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))

    ggml.gguf_init_from_file.argtypes = [ctypes.c_char_p, Parameters]
    for name in (
        "gguf_init_from_file",
        "gguf_get_data_offset",
        "gguf_get_tensor_offset",
        "gguf_get_tensor_size",
    ):
        getattr(ggml, name).restype = ctypes.c_size_t
    for name in ("gguf_get_n_kv", "gguf_get_n_tensors"):
        getattr(ggml, name).restype = ctypes.c_int64

    specs = [
        ONE,
        TensorSpec("two", (5, 32), Q4_0),
        TensorSpec("none", (0, 32), Q4_0),
        TensorSpec("x", (), F32_TYPE),
    ]
    metadata = {"a": keys.string("ə"), "b": keys.array(ValueType.STRING, ["x", "y"])}
    write_gguf(target, metadata, specs, lambda spec: [bytes(spec.nbytes)], alignment=64)
    context = ggml.gguf_init_from_file(bytes(target), Parameters(True, None))
    assert context
    handle = ctypes.c_void_p(context)
    with open_gguf(target) as file:
        assert ggml.gguf_get_n_kv(handle) == len(file.metadata) == 3
        assert ggml.gguf_get_n_tensors(handle) == len(file.tensors) == 4
        assert ggml.gguf_get_data_offset(handle) == file.data_offset
        for index, tensor in enumerate(file.tensors.values()):
            number = ctypes.c_int64(index)
            assert ggml.gguf_get_tensor_offset(handle, number) == tensor.offset - file.data_offset
            assert ggml.gguf_get_tensor_size(handle, number) == tensor.nbytes
    ggml.gguf_free(handle)


def test_the_bytes_are_those_of_the_specification(target: Path) -> None:
    metadata = {
        "f": keys.f32(1.5),
        "w": keys.array(ValueType.STRING, ["ab", ""]),
        "n": keys.array(ValueType.ARRAY, [keys.array(ValueType.FLOAT32, [2])]),
    }
    specs = [TensorSpec("q", (2, 32), Q4_0), ONE]
    contents = {"q": bytes(range(36)), "one": ONE_BYTES}
    write_gguf(target, metadata, specs, lambda spec: [contents[spec.name]])
    pairs = [
        pair("f", F32, struct.pack("<f", 1.5)),
        pair("w", ARRAY, array(STRING, 2, text("ab") + text(""))),
        pair("n", ARRAY, array(ARRAY, 1, array(F32, 1, struct.pack("<f", 2)))),
    ]
    infos = [info("q", [32, 2], 2, 0), info("one", [3], 0, 64)]
    assert target.read_bytes() == build(pairs, infos, bytes(range(36)) + bytes(28) + ONE_BYTES + bytes(20))


INTEGERS = {
    ValueType.UINT8: (0, 2**8 - 1),
    ValueType.INT8: (-(2**7), 2**7 - 1),
    ValueType.UINT16: (0, 2**16 - 1),
    ValueType.INT16: (-(2**15), 2**15 - 1),
    ValueType.UINT32: (0, 2**32 - 1),
    ValueType.INT32: (-(2**31), 2**31 - 1),
    ValueType.UINT64: (0, 2**64 - 1),
    ValueType.INT64: (-(2**63), 2**63 - 1),
}
ITEMS = {
    **{kind: st.integers(*bounds) for kind, bounds in INTEGERS.items()},
    ValueType.FLOAT32: st.floats(width=32, allow_nan=False),
    ValueType.FLOAT64: st.floats(allow_nan=False),
    ValueType.BOOL: st.booleans(),
    ValueType.STRING: st.text(max_size=20)
    | st.binary(max_size=20).map(lambda raw: raw.decode("utf-8", "surrogateescape")),
}


def flat_arrays() -> st.SearchStrategy[MetadataValue]:
    return st.sampled_from(sorted(ITEMS)).flatmap(
        lambda kind: st.lists(ITEMS[kind], max_size=6).map(lambda items: keys.array(kind, items))
    )


VALUES = (
    st.sampled_from(sorted(ITEMS)).flatmap(
        lambda kind: ITEMS[kind].map(lambda item: MetadataValue(kind, item))
    )
    | flat_arrays()
    | st.lists(flat_arrays(), max_size=3).map(lambda items: keys.array(ValueType.ARRAY, items))
)
NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=15)


def as_plain(value: MetadataValue) -> Any:
    if value.element_type is ValueType.ARRAY:
        return [list(item.value) for item in value.value]
    return list(value.value) if value.type is ValueType.ARRAY else value.value


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(metadata=st.dictionaries(NAMES, VALUES, max_size=8))
def test_metadata_come_back(tmp_path: Path, metadata: dict[str, MetadataValue]) -> None:
    path, again = tmp_path / "a.gguf", tmp_path / "b.gguf"
    write_gguf(path, metadata, [ONE], give_one, overwrite=True)
    with open_gguf(path) as file:
        assert list(file.metadata) == list(metadata)
        assert plain(file.metadata) == {key: as_plain(value) for key, value in metadata.items()}
        assert file.metadata_types == {key: value.type for key, value in metadata.items()}
        copied = file.copy_metadata()
        assert copied == metadata
        write_gguf(again, copied, [ONE], give_one, overwrite=True)
    assert again.read_bytes() == path.read_bytes()


def test_odd_values_pass_through_byte_for_byte(target: Path, tmp_path: Path) -> None:
    """Broken UTF-8, a bool of 2, a signalling NaN, nested arrays: a copy keeps them."""
    pairs = [
        pair("s", STRING, text(b"\xff\xed\xa0\x80")),
        pair("b", 7, b"\2"),
        pair("nan", F32, b"\x01\x00\x80\x7f"),
        pair("nans", ARRAY, array(F32, 1, b"\x01\x00\x80\x7f")),
        pair("n", ARRAY, array(ARRAY, 1, array(STRING, 1, text(b"\xc3")))),
    ]
    content = build(pairs, [info("one", [3])], ONE_BYTES + bytes(20))
    (tmp_path / "in.gguf").write_bytes(content)
    with open_gguf(tmp_path / "in.gguf") as file:
        write_gguf(target, file.copy_metadata(), [ONE], lambda spec: [file.tensors[spec.name].data])
    assert target.read_bytes() == content


def test_big_endian_metadata_are_rewritten(target: Path, tmp_path: Path) -> None:
    pairs = [
        pair("f", F32, struct.pack(">f", 1.5), ">"),
        pair("w", ARRAY, array(STRING, 1, text("ab", ">"), ">"), ">"),
        pair("i", ARRAY, array(4, 2, struct.pack(">2I", 7, 8), ">"), ">"),
    ]
    (tmp_path / "big.gguf").write_bytes(build(pairs, order=">"))
    with open_gguf(tmp_path / "big.gguf") as file:
        write_gguf(target, file.copy_metadata(), [], give_one)
        with open_gguf(target) as copy:
            assert copy.byte_order == "<"
            assert plain(copy.metadata) == plain(file.metadata) == {"f": 1.5, "w": ["ab"], "i": [7, 8]}


def test_data_may_come_in_any_pieces(target: Path) -> None:
    spec = TensorSpec("a", (4, 32), Q4_0)
    content = bytes(range(72))
    halves = np.frombuffer(content, np.uint8).reshape(2, 36)
    for pieces in (
        content,
        bytearray(content),
        halves,
        [content[:1], b"", memoryview(content)[1:70], bytearray(content[70:])],
        (row for row in halves),
        [np.frombuffer(content, "<u4"), np.zeros((0, 3))],
    ):
        write_gguf(target, {}, [spec], lambda _, pieces=pieces: pieces, overwrite=True)  # type: ignore[misc]
        with open_gguf(target) as file:
            assert file.tensors["a"].data.tobytes() == content


def test_empty_tensors_are_not_asked_for(target: Path) -> None:
    asked = []

    def data(spec: TensorSpec) -> list[bytes]:
        asked.append(spec.name)
        return [bytes(spec.nbytes)]

    write_gguf(target, {}, [TensorSpec("none", (0, 32), Q4_0), ONE], data)
    assert asked == ["one"]


@pytest.mark.parametrize("alignment", [8, 64, 65536])
def test_alignment(target: Path, alignment: int) -> None:
    specs = [ONE, TensorSpec("two", (3,), F32_TYPE)]
    write_gguf(target, {"k": keys.u8(1)}, specs, give_one, alignment=alignment)
    with open_gguf(target) as file:
        assert list(file.metadata) == ["k", "general.alignment"]
        assert file.alignment == alignment
        assert all(tensor.offset % alignment == 0 for tensor in file.tensors.values())
        assert target.stat().st_size % alignment == 0
        write_gguf(target, file.copy_metadata(), specs, give_one, alignment=alignment, overwrite=True)


def test_progress_counts_to_the_size_of_the_file(target: Path) -> None:
    calls: list[tuple[int, int]] = []
    write_gguf(target, {}, [ONE], give_one, progress=lambda done, total: calls.append((done, total)))
    size = target.stat().st_size
    assert calls[-1] == (size, size)
    assert calls == sorted(calls)
    assert {total for _, total in calls} == {size}


def test_memory_stays_at_one_piece(target: Path) -> None:
    spec = TensorSpec("large", (64, 1 << 18), F32_TYPE)  # 64 MiB
    row = np.zeros(1 << 18, np.float32)
    tracemalloc.start()
    write_gguf(target, {}, [spec], lambda spec: (row for _ in range(64)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6


# What cannot be stored


@pytest.mark.parametrize(
    ("make", "value", "message"),
    [
        *[(kind, bounds[1] + 1, "outside the range") for kind, bounds in INTEGERS.items()],
        *[(kind, bounds[0] - 1, "outside the range") for kind, bounds in INTEGERS.items()],
        (ValueType.UINT32, 1.5, "UINT32"),
        (ValueType.UINT32, "1", "UINT32"),
        (ValueType.UINT32, True, "UINT32"),
        (ValueType.FLOAT32, 1e39, "outside the range"),
        (ValueType.FLOAT32, 10**400, "outside the range"),
        (ValueType.FLOAT64, "1", "FLOAT64"),
        (ValueType.FLOAT64, None, "FLOAT64"),
        (ValueType.BOOL, 1, "BOOL"),
        (ValueType.STRING, b"bytes", "STRING"),
        (ValueType.STRING, "a\ud800", r"U\+D800 at position 1"),
    ],
)
def test_values_that_do_not_fit(make: ValueType, value: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        MetadataValue(make, value)
    with pytest.raises(ArgumentError, match="item 2: .*" + message):
        keys.array(make, [*{"STRING": ["", ""], "BOOL": [True, True]}.get(make.name, [1, 1]), value])


def test_arrays_that_do_not_fit() -> None:
    deep = keys.array(ValueType.UINT8, [])
    for _ in range(7):
        deep = keys.array(ValueType.ARRAY, [deep])
    for items, element_type, message in [
        (5, ValueType.UINT8, "sequence"),
        ("abc", ValueType.STRING, "sequence"),
        ({1: 2}, ValueType.UINT8, "sequence"),
        (np.zeros((2, 2)), ValueType.FLOAT32, "one dimension"),
        (np.array([1.5]), ValueType.INT32, "item 0"),
        (np.array([1, 300]), ValueType.UINT8, "item 1"),
        ([1], ValueType.ARRAY, "item 0"),
        ([deep], ValueType.ARRAY, "nest deeper"),
        ([1], 13, "13"),
        ([1], None, "element type"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            MetadataValue(ValueType.ARRAY, items, element_type)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="element type"):
        MetadataValue(ValueType.UINT8, 1, ValueType.UINT8)


def test_what_was_checked_cannot_change() -> None:
    items = [1, 2]
    value = keys.array(ValueType.UINT8, items)
    items[0] = 9
    assert value == keys.array(ValueType.UINT8, np.array([1, 2], np.int64))
    assert value.value == (1, 2)
    assert hash(value) == hash(keys.array(ValueType.UINT8, (1, 2)))
    assert value != keys.array(ValueType.INT8, [1, 2])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"metadata": {"": keys.u8(1)}}, ArgumentError, "0 bytes"),
        ({"metadata": {"k" * 65536: keys.u8(1)}}, ArgumentError, "65536 bytes"),
        ({"metadata": {"a\0": keys.u8(1)}}, ArgumentError, "NUL"),
        ({"metadata": {"a\ud800": keys.u8(1)}}, ArgumentError, "UTF-8"),
        ({"metadata": {1: keys.u8(1)}}, ArgumentError, "no str"),
        ({"metadata": {"k": 1}}, ArgumentError, "'k'.*azquant.gguf.keys"),
        ({"metadata": {"general.alignment": keys.u32(64)}}, ArgumentError, "alignment"),
        ({"metadata": {"general.alignment": keys.i32(32)}}, ArgumentError, "alignment"),
        ({"alignment": 0}, ArgumentError, "power of two"),
        ({"alignment": 48}, ArgumentError, "power of two"),
        ({"alignment": 4}, ArgumentError, "power of two"),
        ({"alignment": 2**22}, ArgumentError, "power of two"),
        ({"tensors": [ONE, ONE]}, ArgumentError, "two tensors.*'one'"),
        ({"tensors": [TensorSpec("n" * 64, (1,), F32_TYPE)]}, ArgumentError, "64 bytes"),
        ({"tensors": [TensorSpec("", (1,), F32_TYPE)]}, ArgumentError, "0 bytes"),
        ({"tensors": [TensorSpec("a", (2**61,), F32_TYPE)] * 1}, ArgumentError, "more bytes"),
        ({"data": lambda spec: [ONE_BYTES[:-1]]}, ArgumentError, "'one': 11 bytes.*not 12"),
        ({"data": lambda spec: []}, ArgumentError, "'one': 0 bytes"),
        ({"data": lambda spec: [ONE_BYTES, b"x"]}, ArgumentError, "'one': more data"),
        ({"data": lambda spec: [np.zeros((3, 2), np.float32)[:, 0]]}, ArgumentError, "'one'.*contiguous"),
        ({"data": lambda spec: ["text"]}, ArgumentError, "'one'"),
    ],
)
def test_refused_without_a_trace(
    target: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"metadata": {}, "tensors": [ONE], "data": give_one} | changes
    target.write_bytes(b"old")
    with pytest.raises(error, match=message):
        write_gguf(target, overwrite=True, **arguments)
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((33,), "33 elements"),
        ((), "1 elements"),
        ((1, 1, 1, 1, 32), "4 dimensions"),
        ((-1, 32), "4 dimensions"),
        ((2**40, 2**40), "4 dimensions"),
        ((1.5, 32), "no shape"),
        (32, "no shape"),
    ],
)
def test_shapes_that_cannot_be(shape: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=f"'t'.*{message}"):
        TensorSpec("t", shape, Q4_0)


def test_specs_take_the_name_of_a_type() -> None:
    spec = TensorSpec("t", [np.int64(2), 64], "q4_0")  # type: ignore[arg-type]
    assert (spec.shape, spec.type, spec.nbytes) == ((2, 64), Q4_0, 72)


# Where it cannot be written


def test_places_that_are_refused(tmp_path: Path) -> None:
    old = tmp_path / "old.gguf"
    old.write_bytes(b"old")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)

    def never(spec: TensorSpec) -> list[bytes]:
        raise AssertionError("data was asked for")

    for path, message, overwrite in [
        (tmp_path / "none" / "out.gguf", "no folder", False),
        (old / "out.gguf", "Not a directory|no folder", False),
        (old, "already exists", False),
        (tmp_path, "it is a folder", True),
        (Path("/dev/null"), "special file", True),
        (loop, "cannot be written", True),
        (tmp_path / ("x" * 300), "cannot be written", True),
        (Path("nul\0"), "cannot be written", True),
    ]:
        for attempt in (
            lambda path=path, overwrite=overwrite: write_gguf(path, {}, [ONE], never, overwrite=overwrite),
            lambda path=path, overwrite=overwrite: check_output(path, overwrite=overwrite),
        ):
            with pytest.raises(OutputError, match=message):
                attempt()  # type: ignore[no-untyped-call]
    assert old.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop", "old.gguf"]


@pytest.mark.parametrize("link", ["same", "hard", "symbolic", "symbolic folder"])
def test_an_input_is_never_overwritten(tmp_path: Path, link: str) -> None:
    source = tmp_path / "in.gguf"
    source.write_bytes(b"precious")
    other = tmp_path / "in2.gguf"
    if link == "hard":
        other.hardlink_to(source)
    elif link == "symbolic":
        other.symlink_to(source)
    elif link == "symbolic folder":
        (tmp_path / "folder").symlink_to(tmp_path)
        other = tmp_path / "folder" / "in.gguf"
    else:
        other = source
    for first, second in ((source, other), (other, source)):
        with pytest.raises(OutputError, match="same file as the input"):
            write_gguf(second, {}, [ONE], give_one, overwrite=True, sources=[tmp_path / "gone", first])
    assert source.read_bytes() == other.read_bytes() == b"precious"


def test_a_link_is_followed_and_kept(target: Path, tmp_path: Path, mode: str) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(target)
    write_gguf(link, {}, [ONE], give_one)
    assert link.is_symlink()
    assert not target.is_symlink()
    with open_gguf(target) as file:
        assert file.tensors["one"].data.tobytes() == ONE_BYTES


# Whole or not at all


def test_replacing_keeps_the_mode_and_what_readers_hold(target: Path, mode: str) -> None:
    write_gguf(target, {"n": keys.u8(1)}, [ONE], give_one)
    target.chmod(0o600)
    with open_gguf(target) as old:
        write_gguf(target, {"n": keys.u8(2)}, [ONE], lambda spec: [bytes(12)], overwrite=True)
        assert old.metadata["n"] == 1
        assert old.tensors["one"].data.tobytes() == ONE_BYTES
    assert target.stat().st_mode & 0o777 == 0o600
    with open_gguf(target) as new:
        assert new.metadata["n"] == 2


def test_a_new_file_follows_the_umask(target: Path, mode: str) -> None:
    before = os.umask(0o027)
    try:
        write_gguf(target, {}, [ONE], give_one)
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o777 == 0o640


class Stop(BaseException):
    """Like KeyboardInterrupt, but not one that pytest would take for itself."""


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", ["data", "between", "progress", "sync", "verify", "publish"])
def test_an_interruption_leaves_nothing(
    target: Path, mode: str, where: str, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if overwrite:
        target.write_bytes(b"old")

    def stop(*arguments: Any, **more: Any) -> Any:
        raise Stop

    def half(spec: TensorSpec) -> Iterator[bytes]:
        yield ONE_BYTES[:4]
        raise Stop

    data = {"data": stop, "between": half}.get(where, give_one)
    progress = stop if where == "progress" else None
    if where == "sync":
        monkeypatch.setattr(os, "fsync", stop)
    elif where == "verify":
        monkeypatch.setattr(fill, "open_descriptor", stop)
    elif where == "publish":
        monkeypatch.setattr(os, "link", stop)
        monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(Stop):
        write_gguf(target, {}, [ONE], data, overwrite=overwrite, progress=progress)
    monkeypatch.undo()
    if overwrite:
        assert target.read_bytes() == b"old"
    else:
        assert not target.exists()


@pytest.mark.parametrize("call", ["pwrite", "fsync", "preadv", "link"])
def test_a_failing_disk_is_an_output_error(
    target: Path, mode: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **more: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if call == "link":
        monkeypatch.setattr(Path, "replace", full)
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputError, match="No space left"):
        write_gguf(target, {}, [ONE], give_one)
    monkeypatch.undo()
    assert not target.exists()


def test_errors_of_the_data_pass_through(target: Path) -> None:
    def data(spec: TensorSpec) -> list[bytes]:
        raise OSError(errno.EIO, "the input's disk")

    with pytest.raises(OSError, match="the input's disk") as caught:
        write_gguf(target, {}, [ONE], data)
    assert not isinstance(caught.value, OutputError)
    assert not target.exists()


def test_too_little_space_is_seen_before(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = TensorSpec("huge", (2**50,), F32_TYPE)
    with pytest.raises(OutputError, match=r"needs \d+ bytes.*free"):
        write_gguf(target, {}, [spec], give_one)


def test_without_links_through_proc_it_is_copied(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link

    def link(source: Any, *arguments: Any, **more: Any) -> None:
        if str(source).startswith("/proc/"):
            raise OSError(errno.EXDEV, "as in a sandbox")
        real(source, *arguments, **more)

    monkeypatch.setattr(os, "link", link)
    for overwrite in (False, True):
        write_gguf(target, {"n": keys.boolean(overwrite)}, [ONE], give_one, overwrite=overwrite)
        with open_gguf(target) as file:
            assert file.metadata["n"] is overwrite
            assert file.tensors["one"].data.tobytes() == ONE_BYTES


def test_without_hard_links_it_is_renamed(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.EPERM, "as on FAT")

    monkeypatch.setattr(os, "link", link)
    write_gguf(target, {}, [ONE], give_one)
    with open_gguf(target) as file:
        assert file.tensors["one"].data.tobytes() == ONE_BYTES


def test_a_file_that_came_meanwhile_is_kept(target: Path, mode: str) -> None:
    def data(spec: TensorSpec) -> list[bytes]:
        target.write_bytes(b"another's")
        return [ONE_BYTES]

    with pytest.raises(OutputError, match="exists"):
        write_gguf(target, {}, [ONE], data)
    assert target.read_bytes() == b"another's"


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("at", [50, -25])
def test_verification_sees_one_changed_bit(
    target: Path, mode: str, verify: bool, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync
    changed: list[int] = []

    def corrupting(descriptor: int) -> None:
        if not changed:
            changed.append(at % os.fstat(descriptor).st_size)
            byte = os.pread(descriptor, 1, changed[0])
            os.pwrite(descriptor, bytes([byte[0] ^ 1]), changed[0])
        real(descriptor)

    monkeypatch.setattr(os, "fsync", corrupting)
    monkeypatch.setattr(atomic.AtomicFile, "_sync_folder", lambda self: None)
    if not verify:
        write_gguf(target, {}, [ONE], give_one, verify=False)
        assert target.exists()
        return
    with pytest.raises(OutputError, match="its header" if at > 0 else "tensor 'one'"):
        write_gguf(target, {}, [ONE], give_one)
    assert not target.exists()


def run_writer(target: Path, body: str) -> subprocess.Popen[str]:
    """Another process that writes 64 rows to ``target``, doing ``body`` before each."""
    script = f"""
        import os, sys, time
        import numpy as np
        from azquant.gguf import TensorSpec, write_gguf, keys
        from azquant.types import get_type

        def data(spec):
            for row in range(64):
                {body}
                yield np.full(1 << 16, row, np.uint8)

        spec = TensorSpec("a", (64, 1 << 16), get_type("i8"))
        write_gguf(sys.argv[1], {{}}, [spec], data, overwrite=True)
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(target)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="a kill leaves a temporary file without O_TMPFILE")
@pytest.mark.parametrize("row", [0, 1, 30, 63])
def test_a_kill_leaves_the_old_file_and_nothing_else(target: Path, row: int) -> None:
    target.write_bytes(b"old")
    process = run_writer(target, f"print(row, flush=True); time.sleep(60 if row == {row} else 0)")
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == row:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert target.read_bytes() == b"old"
    assert list(target.parent.iterdir()) == [target]


def test_a_limit_on_file_size_is_an_output_error(target: Path) -> None:
    target.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(OutputError, match="File too large"):
            write_gguf(
                target,
                {},
                [TensorSpec("a", (1 << 22,), get_type("i8"))],
                lambda spec: [bytes(1 << 19)] * 8,
                overwrite=True,
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert target.read_bytes() == b"old"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(target: Path) -> None:
    target.parent.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="Permission denied"):
            write_gguf(target, {}, [ONE], give_one)
    finally:
        target.parent.chmod(0o700)


# Names


def test_names_of_keys_and_numbers_are_those_of_the_gguf_package() -> None:
    theirs = {
        value.removeprefix("{arch}.")
        for group in (gguf.Keys.General, gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope, gguf.Keys.Split)
        for value in vars(group).values()
        if isinstance(value, str)
    } | {value for value in vars(gguf.Keys.Tokenizer).values() if isinstance(value, str)}
    ours = {name: value for name, value in vars(keys).items() if name.isupper() and isinstance(value, str)}
    assert len(ours) > 50
    own = {name for name, value in ours.items() if value.startswith("azquant.")}
    assert {name for name, value in ours.items() if value not in theirs} == own
    for name, number in keys.FILE_TYPES.items():
        prefix = "ALL_" if name == "f32" else "MOSTLY_"
        assert gguf.LlamaFileType[prefix + name.upper()] == number
    assert {kind.name: int(kind) for kind in keys.TokenType} == {
        kind.name: int(kind) for kind in gguf.TokenType
    }
    assert keys.of_architecture("gpt2", keys.BLOCK_COUNT) == gguf.Keys.LLM.BLOCK_COUNT.format(arch="gpt2")
