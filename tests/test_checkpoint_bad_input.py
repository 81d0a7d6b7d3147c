"""Broken safetensors files, folders and indexes, and files that are something else: refused, and quickly."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import (
    SECONDS,
    dumps,
    entry,
    read_all,
    safetensors_bytes,
    small_torch_file,
    torch_zip_bytes,
    write,
)

from azquant.checkpoint import open_checkpoint
from azquant.errors import CheckpointError, InputFileError


@pytest.fixture
def quick() -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < SECONDS


def test_vectors_of_safetensors_and_files_found_in_the_wild(shared_data: Path) -> None:
    files = [*(shared_data / "bad-safetensors").iterdir(), *(shared_data / "bad-real").iterdir()]
    verdicts = {"LOAD": 0, "REJECT": 0}
    for path in files:
        verdict = path.name.split("_")[0]
        verdicts[verdict] += 1
        if verdict == "LOAD":
            read_all(path)
        else:
            with pytest.raises(CheckpointError) as caught:
                read_all(path)
            assert caught.value.path == str(path)
    assert verdicts["LOAD"] >= 7 and verdicts["REJECT"] >= 20


def test_every_prefix_of_a_safetensors_file_is_refused(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "a": entry([2], 0, 8), "b": entry([1, 3], 8, 20)}
    whole = safetensors_bytes(header, bytes(range(20)))
    read_all(write(tmp_path / "x.safetensors", whole))
    for size in range(len(whole)):
        with pytest.raises(CheckpointError):
            read_all(write(tmp_path / "x.safetensors", whole[:size]))


DATA16 = bytes(16)
DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BAD_SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "header length 0": (safetensors_bytes(b""), "no JSON object"),
    "header length 8 bytes only": (bytes(8), "no JSON object"),
    "header over 100 MB": ((100_000_001).to_bytes(8, "little") + b"{}", "at most 100000000"),
    "header past the end": ((50).to_bytes(8, "little") + b"{}", "truncated"),
    "header 2^64-1": (b"\xff" * 8 + b"\0{}", "at most 100000000"),
    "not UTF-8": (safetensors_bytes(b'{"\xff": 1}'), "not UTF-8"),
    "not JSON": (safetensors_bytes(b"{hello}"), "not valid JSON"),
    "two objects": (safetensors_bytes(b"{}{}"), "not valid JSON"),
    "a list": (safetensors_bytes(b"[]"), "no JSON object"),
    "duplicate tensor": (
        safetensors_bytes(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}'),
        "duplicate key 'a'",
    ),
    "duplicate field": (
        safetensors_bytes(b'{"a":{"dtype":"U8","shape":[0],"shape":[0],"data_offsets":[0,0]}}'),
        "duplicate key 'shape'",
    ),
    "deep nesting": (safetensors_bytes(DEEP), "nested too deeply"),
    "too many parts": (safetensors_bytes(b'{"a":[' + b"[]," * 1_500_000 + b"0]}"), "parts"),
    "too many tensors": (
        safetensors_bytes(b"{" + b",".join(b'"%d":1' % i for i in range(100_001)) + b"}"),
        "at most 100000",
    ),
    "a number of a million digits": (
        safetensors_bytes(b'{"a":{"shape":[' + b"9" * 1_000_000 + b"]}}"),
        "1000000 digits",
    ),
    "half a surrogate in a name": (
        safetensors_bytes(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
        "surrogate",
    ),
    "metadata no object": (safetensors_bytes({"__metadata__": 1}), "__metadata__"),
    "metadata no strings": (safetensors_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry no object": (safetensors_bytes({"a": 1}), "no JSON object"),
    "entry empty": (safetensors_bytes({"a": {}}), "dtype None"),
    "unknown dtype": (safetensors_bytes({"a": entry([4], 0, 16, "Q4")}, DATA16), "dtype 'Q4'"),
    "dtype no string": (safetensors_bytes({"a": entry([4], 0, 16, [])}, DATA16), "dtype"),
    "shape no list": (safetensors_bytes({"a": entry(4, 0, 16)}, DATA16), "no list of sizes"),
    "shape negative": (safetensors_bytes({"a": entry([-4], 0, 16)}, DATA16), "no list of sizes"),
    "shape of two negatives": (safetensors_bytes({"a": entry([-2, -2], 0, 16)}, DATA16), "no list of sizes"),
    "shape fractional": (safetensors_bytes({"a": entry([4.0], 0, 16)}, DATA16), "no list of sizes"),
    "shape of booleans": (safetensors_bytes({"a": entry([4, True], 0, 16)}, DATA16), "no list of sizes"),
    "shape overflows": (safetensors_bytes({"a": entry([2, (1 << 64) - 2], 0, 16)}, DATA16), "overflows"),
    "shape wraps to the right size": (
        safetensors_bytes({"a": entry([(1 << 62) + 1, 4], 0, 16)}, DATA16),
        "overflows",
    ),
    "shape empty and huge": (safetensors_bytes({"a": entry([0, 1 << 62, 4], 0, 0)}), "overflows"),
    "too many dimensions": (safetensors_bytes({"a": entry([1] * 33, 0, 4)}, bytes(4)), "dimensions"),
    "offsets missing": (safetensors_bytes({"a": {"dtype": "F32", "shape": [4]}}, DATA16), "data_offsets"),
    "three offsets": (
        safetensors_bytes({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16, 16]}}, DATA16),
        "data_offsets",
    ),
    "offset negative": (safetensors_bytes({"a": entry([4], -16, 0)}, DATA16), "data_offsets"),
    "offsets reversed": (safetensors_bytes({"a": entry([4], 16, 0)}, DATA16), "hold -16"),
    "range too short": (safetensors_bytes({"a": entry([4], 0, 12)}, DATA16), "takes 16 bytes"),
    "range too long": (safetensors_bytes({"a": entry([3], 0, 16)}, DATA16), "takes 12 bytes"),
    "range past the end": (safetensors_bytes({"a": entry([5], 0, 20)}, DATA16), "truncated"),
    "range far past the end": (
        safetensors_bytes({"a": entry([1 << 50], 0, 1 << 52)}, DATA16),
        "truncated",
    ),
    "same range twice": (
        safetensors_bytes({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}, DATA16),
        "overlap",
    ),
    "partial overlap": (
        safetensors_bytes({"a": entry([3], 0, 12), "b": entry([2], 8, 16)}, DATA16),
        "overlap",
    ),
    "hole at the start": (safetensors_bytes({"a": entry([3], 4, 16)}, DATA16), "hole of 4 bytes"),
    "hole inside": (safetensors_bytes({"a": entry([1], 0, 4), "b": entry([2], 8, 16)}, DATA16), "hole of 4"),
    "trailing bytes": (safetensors_bytes({"a": entry([3], 0, 12)}, DATA16), "4 bytes after the last tensor"),
    "trailing bytes only": (safetensors_bytes({}, b"PK"), "2 bytes after"),
}


@pytest.mark.parametrize("name", BAD_SAFETENSORS)
def test_bad_safetensors(tmp_path: Path, quick: None, name: str) -> None:
    data, message = BAD_SAFETENSORS[name]
    with pytest.raises(CheckpointError, match=message):
        read_all(write(tmp_path / "x.safetensors", data))


def test_unknown_fields_of_a_tensor_are_ignored_as_in_the_reference_reader(tmp_path: Path) -> None:
    header = {"a": {**entry([4], 0, 16), "note": {"x": [None]}}}
    read_all(write(tmp_path / "x.safetensors", safetensors_bytes(header, DATA16)))


# Files that are something else.

SOMETHING_ELSE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(16), "open it with azquant"),
    "GGUF big-endian": (b"FUGG" + bytes(20), "open it with azquant"),
    "old ggml": (b"lmgg" + bytes(20), "before GGUF"),
    "text": (b"Bu bir m\xc9\x99tndir.\nBir daha.\n", "text file.*starts with 'Bu bir mətndir.'"),
    "web page": (b"<!DOCTYPE html><html>" + b" " * 50, "web page"),
    "old torch tar": (b"pickle".ljust(257, b"\0") + b"ustar" + bytes(300), "tar archive.*torch.save"),
    "bare pickle": (pickle.dumps({"a": 1}, 2), "bare pickle.*torch.save"),
    "random .bin": (bytes(range(7, 200)), "no zip archive"),
    "gzip": (b"\x1f\x8b\x08" + bytes(40), "no zip archive"),
}


@pytest.mark.parametrize("name", SOMETHING_ELSE)
def test_other_files_are_named_for_what_they_are(tmp_path: Path, name: str) -> None:
    data, message = SOMETHING_ELSE[name]
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write(tmp_path / "pytorch_model.bin", data))


def test_the_format_of_torch_before_1_6_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before 1\.6.*torch\.save\(torch\.load\(path"):
        open_checkpoint(path)


def test_torchscript_is_refused_by_name(tmp_path: Path) -> None:
    data = torch_zip_bytes(dumps({}), others={"constants.pkl": b"", "code/m.py": b""})
    with pytest.raises(CheckpointError, match="TorchScript"):
        open_checkpoint(write(tmp_path / "x.pt", data))


def test_a_zip_that_is_no_checkpoint(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.ones(2))
    with pytest.raises(CheckpointError, match=r"no data\.pkl.*'a\.npy'"):
        open_checkpoint(tmp_path / "x.npz")


# Paths, folders, JSON beside the weights.


def test_missing_things(tmp_path: Path) -> None:
    for path in (tmp_path / "gone", tmp_path / "gone.safetensors", "nul\0byte", tmp_path / ("x" * 5000)):
        with pytest.raises(InputFileError):
            open_checkpoint(path)
    with pytest.raises(InputFileError, match=r"none of model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "ckpt.pt").touch()
    with pytest.raises(InputFileError, match=r"It has ckpt\.pt: pass the path"):
        open_checkpoint(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_a_named_pipe_does_not_block(tmp_path: Path, quick: None, name: str) -> None:
    if name == "config.json":
        write(tmp_path / "model.safetensors", safetensors_bytes({}))
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputFileError, match="not a regular file"):
        open_checkpoint(tmp_path)


def test_a_dangling_link_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("blob-that-was-never-fetched")
    with pytest.raises(InputFileError, match="no such file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"[1]", "a JSON object is needed, this is a list"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": "\xff"}', r"not UTF-8 \(at byte 7\)"),
        (DEEP, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "5000 digits"),
        (b'{"a":"' + b" " * 16_000_000 + b'"}', "at most 16000000"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_bad_configs(tmp_path: Path, quick: None, text: bytes, message: str) -> None:
    write(tmp_path / "model.safetensors", safetensors_bytes({}))
    write(tmp_path / "config.json", text)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.path == str(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{}", "no weight_map"),
        (b'{"weight_map": []}', "no weight_map"),
        (b'{"weight_map": {"a": 1}}', "no weight_map"),
        (b'{"weight_map": {}}', "weight_map is empty"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "duplicate key 'a'"),
    ],
)
def test_bad_indexes(tmp_path: Path, text: bytes, message: str) -> None:
    write(tmp_path / "model.safetensors.index.json", text)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_shards_of_two_formats_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", safetensors_bytes({"a": entry([4], 0, 16)}, DATA16))
    write(tmp_path / "b", small_torch_file())
    write(tmp_path / "model.safetensors.index.json", b'{"weight_map": {"a": "a", "b": "b"}}')
    with pytest.raises(CheckpointError, match="mix"):
        open_checkpoint(tmp_path)
