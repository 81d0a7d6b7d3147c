"""Broken GGUF files: every one is refused with a GGUFError that says where, or opens as something valid.

The numbers in the names of the cases are the classes of the project's catalogue of bad input.
"""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from gguf_builder import ARRAY, BOOL, F32, I32, STRING, U8, U16, U32, array, gguf, info, pair, text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from azquant.errors import GGUFError
from azquant.gguf import GGUFArray, open_gguf

U64_MAX = 2**64 - 1


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def nested(depth: int) -> bytes:
    """Arrays within each other, ``depth`` of them, the innermost of no bytes."""
    return array(ARRAY, 1, b"") * (depth - 1) + array(U8, 0, b"")


def with_alignment(payload: bytes, kind: int = U32) -> bytes:
    return gguf([pair("general.alignment", kind, payload)], [info("a", [8])], bytes(32))


def one_tensor(*args: object, data: bytes = bytes(64), **more: object) -> bytes:
    return gguf([], [info(*args, **more)], data)  # type: ignore[arg-type]


DUPLICATE = pair("k", U8, b"\1")
SIZES_WRAP = [info("a", [2**63 - 32], 24, 0), info("b", [2**63 - 32], 24, 2**63 - 32), info("c", [64], 24, 0)]

REFUSED: dict[str, tuple[bytes, str, int | None]] = {
    # name: bytes, what the message says, the offset it gives
    "01 empty": (b"", "empty", 0),
    "01 magic only": (b"GGUF", "version", 4),
    "02 reversed magic": (gguf(magic=b"FUGG"), "reversed", 0),
    "02 legacy": (b"lmgg" + bytes(100), "before GGUF", 0),
    "02 pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull", 0),
    "02 text": (b"hello world, this is text", "hell", 0),
    "02 three bytes": (b"GGU", "GGU", 0),
    "03 version 0": (gguf(version=0), "version 0", 4),
    "03 version 1": (gguf(version=1), "version 1", 4),
    "03 version 1 swapped": (gguf(version=1, order=">"), "version 1", 4),
    "03 version 4": (gguf(version=4), "version 4", 4),
    "03 version 4 swapped": (gguf(version=4, order=">"), "version", 4),
    "04 n_kv 2^64-1": (gguf(n_pairs=U64_MAX), "keys", 16),
    "04 n_kv 2^62": (gguf(n_pairs=2**62), "keys", 16),
    "04 n_kv wraps": (gguf(n_pairs=2**64 // 48 + 1), "keys", 16),
    "04 n_kv 1e6": (gguf(n_pairs=10**6, data=bytes(999)), "keys", 16),
    "04 n_kv one too many": (gguf([DUPLICATE], n_pairs=2, data=None), "2 keys", 16),
    "05 n_tensors 2^64-1": (gguf(n_infos=U64_MAX), "tensors", 8),
    "05 n_tensors 2^61+1": (gguf(n_infos=2**61 + 1), "tensors", 8),
    "05 n_tensors 1000": (gguf(n_infos=1000), "1000 tensors", 8),
    "06 key length 2^64-1": (gguf([text("k", length=U64_MAX) + bytes(30)]), "bytes long", 24),
    "06 key length over the end": (
        gguf([text("k", length=100) + bytes(30)], data=None),
        "ends inside key 0",
        24,
    ),
    "06 key empty": (gguf([pair("", U8, b"\1") + bytes(9)]), "key 0 is 0 bytes", 24),
    "06 key twice": (gguf([DUPLICATE, DUPLICATE]), "'k' occurs twice", 38),
    "06 alignment twice": (gguf([pair("general.alignment", U32, u32(32))] * 2), "twice", 57),
    "07 string 2^64-1": (gguf([pair("k", STRING, text("v", length=U64_MAX))]), "'k': a string", 37),
    "07 string 2^40": (gguf([pair("k", STRING, text("v", length=2**40))]), "string", 37),
    "07 string one too long": (gguf([pair("k", STRING, text("abc", length=4))], data=None), "string", 37),
    "08 value type 13": (gguf([pair("k", 13, b"\1")]), "value type 13", 33),
    "08 value type 2^32-1": (gguf([pair("k", 2**32 - 1, b"\1")]), "value type 4294967295", 33),
    "08 element type 13": (gguf([pair("k", ARRAY, array(13, 1, b"\1"))]), "value type 13", 37),
    "09 array 2^62": (gguf([pair("k", ARRAY, array(U8, 2**62, b""))]), "array of 4611686018427387904", 41),
    "09 array 2^63": (gguf([pair("k", ARRAY, array(F32, 2**63, b""))]), "array", 41),
    "09 array wraps": (gguf([pair("k", ARRAY, array(10, 2**61 + 1, bytes(8)))]), "array", 41),
    "09 array one too long": (gguf([pair("k", ARRAY, array(U16, 2, b"\1\2\3"))], data=None), "3 remain", 41),
    "10 strings 2^60": (gguf([pair("k", ARRAY, array(STRING, 2**60, text("a")))]), "array", 41),
    "10 strings 1e9": (gguf([pair("k", ARRAY, array(STRING, 10**9, text("a")))]), "array", 41),
    "10 second string too long": (
        gguf([pair("k", ARRAY, array(STRING, 2, text("a") + text("b", length=U64_MAX)))]),
        "a string of the array",
        58,
    ),
    "10 no room for a string": (
        gguf([pair("k", ARRAY, array(STRING, 2, text("abcdefghi") + b"1234567"))], data=None),
        "a string of the array",
        66,
    ),
    "11 nested 20000": (gguf([pair("k", ARRAY, nested(20000))]), "nest deeper", None),
    "11 nested 9": (gguf([pair("k", ARRAY, nested(9))]), "nest deeper", None),
    "12 alignment 0": (with_alignment(u32(0)), "alignment is 0", 53),
    "12 alignment 13": (with_alignment(u32(13)), "alignment is 13", 53),
    "12 alignment 48": (with_alignment(u32(48)), "alignment is 48", 53),
    "12 alignment 2^30": (with_alignment(u32(2**30)), "alignment", 53),
    "12 alignment 2^31": (with_alignment(u32(2**31)), "alignment", 53),
    "12 alignment int32": (with_alignment(u32(32), I32), "INT32", 53),
    "12 alignment string": (with_alignment(text("32"), STRING), "STRING", 53),
    "13 name of 64": (one_tensor("n" * 64, [8]), "64 bytes", 24),
    "13 name empty": (one_tensor("", [8]), "0 bytes", 24),
    "13 name with NUL": (one_tensor("a\0b", [8]), "NUL", 32),
    "13 name no UTF-8": (one_tensor(b"a\xff", [8]), "UTF-8", 32),
    "13 name twice": (gguf([], [info("a", [8]), info("a", [8], 0, 32)], bytes(64)), "'a' occurs twice", 57),
    "14 five dimensions": (one_tensor("a", [1] * 5), "5 dimensions", 33),
    "14 a million dimensions": (one_tensor("a", [1], n_dims=10**6), "1000000 dimensions", 33),
    "15 dimension -1": (one_tensor("a", [-1]), "shape", 37),
    "15 dimension -1 of none": (one_tensor("a", [0, -1]), "shape", 37),
    "17 product 2^64": (one_tensor("a", [2**32, 2**32]), "shape", 37),
    "17 product wraps to 4": (one_tensor("a", [2**32 + 2, 2**63 // 2**32 + 2, 2]), "shape", 37),
    "17 product 2^63": (one_tensor("a", [2**31, 2**32]), "shape", 37),
    "18 bytes overflow": (one_tensor("a", [2**62, 1]), "fits in no file", 57),
    "19 padding wraps": (one_tensor("a", [4, 1073741823, 1073741825]), "fits in no file", 65),
    "20 sizes wrap": (gguf([], SIZES_WRAP, bytes(64)), "fits in no file", None),
    "20 offset 2^63": (one_tensor("a", [8], 0, 2**63), "fits in no file", 49),
    "21 type 43": (one_tensor("a", [32], 43), "unknown type 43", 45),
    "21 type -1": (one_tensor("a", [32], 2**32 - 1), "unknown type", 45),
    "21 type 4": (one_tensor("a", [32], 4), "unknown type 4", 45),
    "22 half a block": (one_tensor("a", [48, 2], 2), "rows of 48 elements", 53),
    "22 block over rows": (one_tensor("a", [128, 2], 12), "rows of 128", 53),
    "22 a scalar block": (one_tensor("a", [], 2), "rows of 1", 37),
    "23 offset -1": (one_tensor("a", [8], 0, U64_MAX), "fits in no file", 49),
    "23 offset past the end": (one_tensor("a", [8], 0, 64), "takes bytes", 49),
    "23 offset wraps": (one_tensor("a", [8], 0, 2**64 - 32), "fits in no file", 49),
    "23 offset unaligned": (one_tensor("a", [8], 0, 16), "no multiple of 32", 49),
    "24 overlap": (gguf([], [info("a", [16]), info("b", [8], 0, 32)], bytes(64)), "overlap", 82),
    "24 overlap backwards": (gguf([], [info("b", [8], 0, 32), info("a", [16])], bytes(64)), "overlap", 49),
    "24 the same place": (gguf([], [info("a", [8]), info("b", [8])], bytes(64)), "overlap", None),
    "25 one byte short": (one_tensor("a", [8], data=bytes(31)), "cut short", 49),
    "25 one byte there": (one_tensor("a", [2**20], data=bytes(1)), "cut short", 49),
    "25 padding cut": (gguf([], [info("a", [8])], data=None), "before the data should begin", 57),
    "27 GGUF at 7": (bytes(7) + gguf(), "not a GGUF file", 0),
    "28 key no UTF-8": (gguf([pair(b"\xff\xfe", U8, b"\1")]), "UTF-8", 32),
    "28 key with NUL": (gguf([pair(b"a\0", U8, b"\1")]), "NUL", 32),
}

LOADED: dict[str, bytes] = {
    "11 nested 8": gguf([pair("k", ARRAY, nested(8))]),
    "13 name of 63": one_tensor("n" * 63, [8]),
    "13 name with slash": one_tensor("a/b", [8]),
    "14 no dimensions": one_tensor("a", []),
    "16 dimension 0": one_tensor("a", [32, 0], 2),
    "16 first dimension 0": one_tensor("a", [0, 5], 2),
    "27 bytes after the data": one_tensor("a", [8], data=bytes(32) + b"GGUF" * 99),
    "28 bool 2": gguf([pair("k", BOOL, b"\2")]),
    "28 value no UTF-8": gguf([pair("k", STRING, text(b"\xff\xc3"))]),
    "29 header only": gguf([pair("k", U8, b"\1")], [info("a", [8])]),
    "30 newest type": one_tensor("a", [64], 42),
}


def read_everything(path: Path) -> None:
    """What a user could do with a file. Raises nothing but GGUFError, whatever the file holds."""
    with open_gguf(path) as file:
        for value in file.metadata.values():
            if isinstance(value, GGUFArray):
                assert len(value.tolist()) == len(value)
        assert list(file.copy_metadata()) == list(file.metadata_types)
        for tensor in file.tensors.values():
            if file.has_data or not tensor.nbytes:
                assert tensor.data.size == tensor.nbytes
            else:
                with pytest.raises(GGUFError, match="header only"):
                    _ = tensor.data


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    content, message, offset = REFUSED[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    started = time.process_time()
    with pytest.raises(GGUFError) as caught:
        open_gguf(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))
    assert caught.value.path == str(path)
    assert caught.value.offset is not None
    assert 0 <= caught.value.offset <= len(content)
    if offset is not None:
        assert caught.value.offset == offset
    assert time.process_time() - started < 2


@pytest.mark.parametrize("name", LOADED)
def test_loaded(tmp_path: Path, name: str) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(LOADED[name])
    read_everything(path)


def small_file() -> bytes:
    words = text("ab") + text("") + text("c")
    pairs = [
        pair("a", U32, u32(7)),
        pair("words", ARRAY, array(STRING, 3, words)),
        pair("deep", ARRAY, array(ARRAY, 2, array(U8, 1, b"\1") + array(STRING, 1, text("x")))),
        pair("s", STRING, text("text")),
    ]
    return gguf(pairs, [info("t", [32], 2), info("u", [3], 0, 32)], bytes(32) + bytes(12))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    """Class 26. The one cut that opens is that at the data's beginning: a file of header only."""
    content = small_file()
    path = tmp_path / "cut.gguf"
    path.write_bytes(content)
    with open_gguf(path) as file:
        data_offset = file.data_offset
    for length in range(len(content)):
        path.write_bytes(content[:length])
        if length == data_offset:
            with open_gguf(path) as file:
                assert not file.has_data
            continue
        with pytest.raises(GGUFError):
            open_gguf(path)


@pytest.mark.parametrize("byte", [0x00, 0x01, 0x7F, 0x80, 0xFF])
def test_every_byte_changed(tmp_path: Path, byte: int) -> None:
    content = small_file()
    path = tmp_path / "changed.gguf"
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([byte]) + content[at + 1 :])
        try:
            read_everything(path)
        except GGUFError as error:
            assert error.offset is not None


@settings(max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 400), st.integers(0, 8), st.binary(max_size=12)), min_size=1, max_size=6
    )
)
def test_mutations(tmp_path: Path, edits: list[tuple[int, int, bytes]]) -> None:
    content = small_file()
    for at, removed, put in edits:
        content = content[:at] + put + content[at + removed :]
    path = tmp_path / "mutated.gguf"
    path.write_bytes(content)
    try:
        read_everything(path)
    except GGUFError as error:
        assert error.offset is not None


@pytest.mark.parametrize(
    "make",
    [
        lambda: gguf([pair("k", ARRAY, array(ARRAY, 200_000, array(U8, 0, b"") * 200_000))]),
        lambda: gguf([pair("k", ARRAY, array(STRING, 400_000, bytes(8) * 400_000))]),
        lambda: gguf([pair("k", ARRAY, array(ARRAY, 2**20, b"\0" * 12 * 2**17))]),
        lambda: gguf([], [info(f"{i:06}", [0]) for i in range(100_000)]),
        lambda: gguf([pair(f"{i:06}", U8, b"\1") for i in range(60_000)]),
    ],
    ids=["empty arrays", "empty strings", "too many arrays", "tensors", "keys"],
)
def test_time_and_memory_follow_the_size_of_the_file(tmp_path: Path, make: Callable[[], bytes]) -> None:
    path = tmp_path / "many.gguf"
    path.write_bytes(make())
    started = time.process_time()
    with suppress(GGUFError):
        open_gguf(path).close()
    assert time.process_time() - started < 2
    tracemalloc.start()
    with suppress(GGUFError):
        open_gguf(path).close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


def test_files_of_llama_cpps_own_test(shared_data: Path) -> None:
    paths = sorted((shared_data / "bad-gguf/llamacpp-test-gguf").glob("*.gguf"))
    assert len(paths) > 30
    for path in paths:
        if "_REJECT_" in path.name:
            with pytest.raises(GGUFError):
                open_gguf(path)
        else:
            read_everything(path)


def test_broken_models_and_files_found_in_the_wild(shared_data: Path) -> None:
    paths = [
        *(shared_data / "bad-gguf/model-level").glob("*.gguf"),
        *(shared_data / "bad-real").glob("*.gguf"),
    ]
    assert len(paths) > 25
    for path in paths:
        if path.name.startswith("REJECT"):
            with pytest.raises(GGUFError):
                open_gguf(path)
        else:  # SEMREJECT: the model is wrong, the file is not
            read_everything(path)
    for path in (shared_data / "bad-real").glob("*.bin"):
        with pytest.raises(GGUFError, match="before GGUF"):
            open_gguf(path)
