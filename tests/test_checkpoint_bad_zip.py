"""Broken and hostile zip archives, truncated and mutated files: refused, and quickly."""

from __future__ import annotations

import contextlib
import struct
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_files import (
    GOOD,
    SECONDS,
    dumps,
    entry,
    read_all,
    safetensors_bytes,
    small_torch_file,
    tensor,
    torch_zip_bytes,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from azquant.errors import AzquantError, CheckpointError


@pytest.fixture
def quick() -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < SECONDS


def test_every_prefix_of_a_torch_file_is_refused(tmp_path: Path) -> None:
    whole = small_torch_file()
    read_all(write(tmp_path / "x.bin", whole))
    for size in range(len(whole)):
        with pytest.raises(CheckpointError):
            read_all(write(tmp_path / "x.bin", whole[:size]))


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_mutated_files_give_tensors_or_our_errors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    header = {"a": entry([2], 0, 8), "b": entry([1, 3], 8, 20)}
    base = data.draw(st.sampled_from([small_torch_file(), safetensors_bytes(header, bytes(20))]))
    mutated = bytearray(base)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        what = data.draw(st.sampled_from(["set", "insert", "delete"]))
        if what == "set":
            mutated[at] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
        elif what == "insert":
            mutated[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        elif len(mutated) > 8:
            del mutated[at : at + data.draw(st.integers(1, 8))]
    path = tmp_path_factory.getbasetemp() / "mutated.bin"
    path.write_bytes(mutated)
    start = time.process_time()
    with contextlib.suppress(AzquantError):
        read_all(path)
    assert time.process_time() - start < SECONDS


def edit_directory(data: bytes, member: int, field: int, value: int) -> bytes:
    """``data`` with one field of one entry of its central directory replaced."""
    at = struct.unpack_from("<I", data, len(data) - 6)[0]
    for _ in range(member):
        at += 46 + sum(struct.unpack_from("<3H", data, at + 28))
    fields = list(struct.unpack_from("<4s6H3I5H2I", data, at))
    fields[field] = value
    return data[:at] + struct.pack("<4s6H3I5H2I", *fields) + data[at + 46 :]


FLAGS, METHOD, PACKED, LENGTH, NAME_SIZE, HEADER = 3, 4, 8, 9, 10, 16


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (FLAGS, 1, "encrypted"),
        (METHOD, 8, "compressed"),
        (PACKED, 5, "compressed"),
        (LENGTH, 5, "compressed"),
        (LENGTH, 0xFFFFFFFF, "64-bit sizes are missing"),
        (HEADER, 0xFFFFFFFF, "64-bit sizes are missing"),
        (HEADER, 1, "overlaps|broken header"),
        (HEADER, 0xFFFFFFFE, "overlaps"),
        (NAME_SIZE, 0xFFFF, "damaged"),
        (NAME_SIZE, 0, "damaged"),
        (0, b"PK\0\0", "damaged"),
    ],
)
def test_bad_zip_directory_entries(tmp_path: Path, field: int, value: int, message: str) -> None:
    for member in range(2):
        path = write(tmp_path / "x.bin", edit_directory(small_torch_file(), member, field, value))
        with pytest.raises(CheckpointError, match=message):
            read_all(path)


def test_a_member_larger_than_the_file(tmp_path: Path) -> None:
    data = edit_directory(edit_directory(small_torch_file(), 0, PACKED, 1 << 30), 0, LENGTH, 1 << 30)
    with pytest.raises(CheckpointError, match="overlaps what follows"):
        read_all(write(tmp_path / "x.bin", data))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (3, 5, "broken header"),  # the signature
        (6, 1, "broken header"),  # encrypted
        (8, 8, "broken header"),  # compressed
        (30, ord("x"), "another name"),
        (27, 1, "another name|truncated"),  # the name's length
        (29, 1, "runs into what follows"),  # the extra field's length
    ],
)
def test_local_headers_must_agree(tmp_path: Path, at: int, value: int, message: str) -> None:
    data = bytearray(small_torch_file())
    data[data.index(b"archive/data/0") - 30 + at] = value
    with pytest.raises(CheckpointError, match=message):
        read_all(write(tmp_path / "x.bin", bytes(data)))


def test_the_end_records_must_agree(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "x.bin")
    data = bytearray((tmp_path / "x.bin").read_bytes())
    data[-12] ^= 1  # the number of members, in the short record only
    data[-14] ^= 1
    with pytest.raises(CheckpointError, match="disagree"):
        read_all(write(tmp_path / "x.bin", bytes(data)))


@pytest.mark.parametrize("claimed", [0xFFFE, 60_000])
def test_more_members_than_there_are(tmp_path: Path, claimed: int) -> None:
    data = bytearray(small_torch_file())
    struct.pack_into("<2H", data, len(data) - 14, claimed, claimed)
    with pytest.raises(CheckpointError, match=f"claims {claimed} members in"):
        read_all(write(tmp_path / "x.bin", bytes(data)))


def test_an_absurd_number_of_members(tmp_path: Path, quick: None) -> None:
    count = 3_000_000
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, count * 46, 30)
    end = struct.pack("<4sIQI", b"PK\6\7", 0, 30 + count * 46, 1) + struct.pack(
        "<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0
    )
    with (tmp_path / "x.bin").open("wb") as f:  # sparse: 138 MB of zeros
        f.write(b"PK\3\4".ljust(30, b"\0"))
        f.seek(30 + count * 46)
        f.write(end64 + end)
    with pytest.raises(CheckpointError, match="claims 3000000 members; at most 100000"):
        read_all(tmp_path / "x.bin")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_compressed_members_are_refused_so_that_no_bomb_can_unfold(
    tmp_path: Path, quick: None, compression: int
) -> None:
    bomb = torch_zip_bytes(
        dumps({"w": tensor(GOOD, 0, (6,), (1,))}), {"0": bytes(10_000_000)}, compression=compression
    )
    assert len(bomb) < 100_000
    with pytest.raises(CheckpointError, match="compressed"):
        read_all(write(tmp_path / "x.bin", bomb))


def test_members_may_not_share_bytes(tmp_path: Path) -> None:
    data = small_torch_file()
    directory = struct.unpack_from("<I", data, len(data) - 6)[0]
    first = struct.unpack_from("<I", data, directory + 42)[0]
    with pytest.raises(CheckpointError, match="overlaps"):
        read_all(write(tmp_path / "x.bin", edit_directory(data, 1, HEADER, first)))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_may_not_share_a_name(tmp_path: Path) -> None:
    path = write(tmp_path / "x.bin", small_torch_file())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", bytes(24))
    with pytest.raises(CheckpointError, match="two zip members are called 'archive/data/0'"):
        read_all(path)


def test_bytes_after_the_archive_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="follow the end"):
        read_all(write(tmp_path / "x.bin", small_torch_file() + b"#!/bin/sh"))


def test_two_pickles_or_none(tmp_path: Path) -> None:
    path = write(tmp_path / "x.bin", small_torch_file())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", b"")
    with pytest.raises(CheckpointError, match=r"with 2 data\.pkl"):
        read_all(path)


@pytest.mark.parametrize("order", [b"", b"middle", b"little\n", b"x" * 17])
def test_an_unknown_byte_order_is_refused(tmp_path: Path, order: bytes) -> None:
    data = torch_zip_bytes(
        dumps({"w": tensor(GOOD, 0, (6,), (1,))}), {"0": bytes(24)}, others={"byteorder": order}
    )
    with pytest.raises(CheckpointError, match=r"byte order|at most 16"):
        read_all(write(tmp_path / "x.bin", data))


def test_an_oversized_pickle_is_not_read(tmp_path: Path, quick: None) -> None:
    name = b"archive/data.pkl"
    size = 100_000_001
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, size, size, len(name), 0) + name
    central = (
        struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, size, size, len(name), 0, 0, 0, 0, 0, 0)
        + name
    )
    with (tmp_path / "x.bin").open("wb") as f:
        f.write(local)
        f.seek(len(local) + size)
        f.write(central + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(central), len(local) + size, 0))
    with pytest.raises(CheckpointError, match=r"data\.pkl has 100000001 bytes; at most 100000000"):
        read_all(tmp_path / "x.bin")
