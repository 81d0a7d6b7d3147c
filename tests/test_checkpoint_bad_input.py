"""Broken and hostile checkpoints: each gives one of our exceptions, quickly, and nothing is executed."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import (
    ORDERED_DICT,
    REBUILD,
    Call,
    Global,
    Storage,
    dumps,
    entry,
    safetensors_bytes,
    small_torch_file,
    tensor,
    torch_zip_bytes,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from azquant.checkpoint import open_checkpoint
from azquant.checkpoint.unpickler import MAX_OPCODES, load_pickle
from azquant.errors import AzquantError, CheckpointError, InputFileError, UnsafePickleError

SECONDS = 2.0  # of processor time: what opening any file may take


def read_all(path: Path) -> None:
    """Open and read everything, as a converter would."""
    with open_checkpoint(path) as c:
        for t in c.tensors.values():
            t.read()
        _ = c.extra


@pytest.fixture
def quick() -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < SECONDS


# safetensors.


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


# Pickles.


class Evil:
    """Runs a shell command when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.command = f"touch {marker}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("container", ["zip", "bare", "inside a state dict"])
def test_a_shell_command_is_not_run(tmp_path: Path, protocol: int, container: str) -> None:
    marker = tmp_path / "pwned"
    payload: Any = Evil(marker)
    if container == "inside a state dict":
        payload = {"model": {"a": 1}, "args": [payload]}
    attack = pickle.dumps(payload, protocol)
    pickle.loads(attack)
    assert marker.exists(), "the attack itself must work, or this test proves nothing"
    marker.unlink()
    path = write(tmp_path / "x.bin", attack if container == "bare" else torch_zip_bytes(attack))
    expected = CheckpointError if container == "bare" else UnsafePickleError
    with pytest.raises(expected) as caught:
        read_all(path)
    if container != "bare":
        assert "system" in str(caught.value) or protocol == 0 or "opcode" in str(caught.value)
    assert not marker.exists()


def test_a_whole_pickled_model_is_refused_by_the_name_of_its_class(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.bin")
    with pytest.raises(UnsafePickleError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict\(\)"):
        open_checkpoint(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("builtins", "dict"),
        ("posix", "system"),
        ("torch", "load"),
        ("torch", "FloatStorage.from_file"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch._utils", "_import_dotted_name"),
        ("torch.storage", "_load_from_bytes"),
        ("collections", "Counter"),
        ("azquant.checkpoint", "open_checkpoint"),
        ("", ""),
    ],
)
def test_every_other_global_is_refused_by_name(tmp_path: Path, module: str, name: str) -> None:
    classic = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"."
    texts = b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name))
    for attack in (classic, b"\x80\x04" + texts + b"\x93."):
        with pytest.raises(UnsafePickleError) as caught:
            open_checkpoint(write(tmp_path / "x.bin", torch_zip_bytes(attack)))
        assert f"{module}.{name}" in str(caught.value)
        assert caught.value.offset is not None


F32 = Global("torch", "FloatStorage")
GOOD = Storage("FloatStorage", "0", 6)  # 24 bytes; what each case below changes is the tensor
ARGS = (GOOD, 0, (2, 3), (3, 1), False, None)
BIG = 1 << 62


def rebuild(*args: Any, function: str = "_rebuild_tensor_v2") -> Call:
    return Call(Global("torch._utils", function), *args)


BAD_TENSORS: dict[str, tuple[Any, str]] = {
    "beyond the storage": (tensor(GOOD, 0, (2, 4), (4, 1)), "reaches element 7.*has 6"),
    "offset beyond the storage": (tensor(GOOD, 1, (2, 3), (3, 1)), "reaches element 6"),
    "stride beyond the storage": (tensor(GOOD, 0, (2, 3), (4, 1)), "reaches element 6"),
    "offset huge": (tensor(GOOD, BIG, (1,), (1,)), "reaches element"),
    "offset times size wraps": (tensor(GOOD, 1 << 61, (1,), (1,)), "reaches element"),
    "stride wraps": (tensor(GOOD, 0, (5,), (BIG,)), "reaches element"),
    "negative stride": (tensor(GOOD, 5, (6,), (-1,)), "stride -1 is no size"),
    "negative offset": (tensor(GOOD, -1, (1,), (1,)), "storage offset -1 is no size"),
    "negative size": (tensor(GOOD, 0, (-1,), (1,)), "shape -1 is no size"),
    "fractional size": (tensor(GOOD, 0, (1.0,), (1,)), "shape 1.0 is no size"),
    "boolean size": (tensor(GOOD, 0, (True,), (1,)), "is no size"),
    "size beyond 63 bits": (tensor(GOOD, 0, (1 << 64,), (0,)), "is no size"),
    "shape overflows": (tensor(GOOD, 0, (BIG, BIG), (0, 0)), "overflows"),
    "shape empty and huge": (tensor(GOOD, 0, (0, BIG, BIG), (0, 0, 0)), "overflows"),
    "an expansion to terabytes": (tensor(GOOD, 0, (1 << 20, 1 << 20), (0, 0)), "contiguous"),
    "an overlapping view to gigabytes": (tensor(GOOD, 0, (1 << 30, 2), (0, 1)), "contiguous"),
    "more sizes than strides": (tensor(GOOD, 0, (2, 3), (3,)), "2 sizes but 1 strides"),
    "shape is a number": (tensor(GOOD, 0, 6, (1,)), "shape is a int"),
    "shape is a dict": (tensor(GOOD, 0, {}, {}), "shape is a dict"),
    "33 dimensions": (tensor(GOOD, 0, (1,) * 33, (1,) * 33), "33 dimensions"),
    "storage is a tuple": (tensor(("storage", F32, "0", "cpu", 6), 0, (1,), (1,)), "no element type"),
    "storage is None": (tensor(None, 0, (1,), (1,)), "no element type"),
    "storage is a tensor": (tensor(tensor(GOOD, 0, (1,), (1,)), 0, (1,), (1,)), "no element type"),
    "no arguments": (rebuild(), "0 arguments"),
    "too many arguments": (rebuild(*ARGS, None, None), "8 arguments"),
    "negated lazily": (rebuild(*ARGS, {"neg": True}), "resolve_neg"),
    "parameter of nothing": (rebuild(None, True, None, function="_rebuild_parameter"), "no tensor"),
    "parameter without arguments": (rebuild(function="_rebuild_parameter"), "no tensor"),
    "untyped without a type": (
        rebuild(*ARGS, None, function="_rebuild_tensor_v3"),
        "no known dtype",
    ),
    "untyped in the old way": (tensor(Storage("UntypedStorage", "0", 24), 0, (1,), (1,)), "no element type"),
    "complex numbers": (tensor(Storage("ComplexFloatStorage", "0", 3), 0, (1,), (1,)), "ComplexFloatStorage"),
    "quantized tensor": (rebuild(function="_rebuild_qtensor"), "_rebuild_qtensor"),
    "storage larger than its record": (
        tensor(Storage("FloatStorage", "0", 7), 0, (7,), (1,)),
        "has 24 bytes, 7 elements of F32 need 28",
    ),
    "storage smaller than its record": (tensor(Storage("FloatStorage", "0", 5), 0, (5,), (1,)), "need 20"),
    "storage of 2^62 elements": (tensor(Storage("FloatStorage", "0", BIG), 0, (1,), (1,)), "need"),
    "storage of negative size": (tensor(Storage("FloatStorage", "0", -1), 0, (1,), (1,)), "is no size"),
    "storage missing": (tensor(Storage("FloatStorage", "9", 6), 0, (6,), (1,)), "data/9 is missing"),
    "storage elsewhere": (
        tensor(Storage("FloatStorage", "../../etc/passwd", 6), 0, (6,), (1,)),
        "is missing from the archive",
    ),
    "storage key of a megabyte": (
        tensor(Storage("FloatStorage", "k" * (1 << 20), 6), 0, (6,), (1,)),
        "without type or key",
    ),
    "storage type called": (Call(F32, 6), "calls a StorageType"),
    "text called": (Call("os.system", "true"), "calls a str"),
    "the result of a call called": (Call(Call(ORDERED_DICT)), "calls a dict"),
    "OrderedDict with arguments": (Call(ORDERED_DICT, [("a", 1)]), "OrderedDict: arguments"),
    "state set on a tensor": (
        Call(REBUILD, *ARGS, state={"__class__": 1}),
        "sets the state of a TensorRef",
    ),
    "state set on a list": (Call(Global("torch", "Size"), (1,), state={}), "sets the state of a tuple"),
    "Size of text": (Call(Global("torch", "Size"), "x"), "size is a str"),
    "Size of nothing": (Call(Global("torch", "Size")), "0 arguments"),
    "device of nothing": (Call(Global("torch", "device")), "no device name"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors(tmp_path: Path, quick: None, name: str) -> None:
    value, message = BAD_TENSORS[name]
    data = torch_zip_bytes(dumps({"w": value}), {"0": bytes(24)})
    with pytest.raises(CheckpointError, match=message):
        read_all(write(tmp_path / "x.bin", data))


def test_an_untyped_storage_bounds_its_tensor_by_bytes(tmp_path: Path) -> None:
    storage = Storage("UntypedStorage", "0", 24, module="torch.storage")
    for numel, fits in ((12, True), (13, False)):
        call = rebuild(
            storage, 0, (numel,), (1,), False, None, Global("torch", "int16"), function="_rebuild_tensor_v3"
        )
        path = write(tmp_path / "x.bin", torch_zip_bytes(dumps({"w": call}), {"0": bytes(24)}))
        if fits:
            read_all(path)
        else:
            with pytest.raises(CheckpointError, match="reaches element 12"):
                read_all(path)


P = b"\x80\x02"
BAD_PICKLES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "ends too early"),
    "no stop": (P + b"}", "ends too early"),
    "stop with nothing": (P + b".", "one object"),
    "stop with two": (P + b"}}.", "one object"),
    "stop inside a mark": (P + b"(}.", "one object"),
    "bytes after stop": (P + b"}.}", "follow the end"),
    "protocol 6": (b"\x80\x06}.", "protocol 6"),
    "protocol in the middle": (P + b"}" + P + b".", "protocol 2"),
    "unknown opcode": (P + b"\xff.", "opcode 0xff"),
    "INST": (P + b"(ios\nsystem\n.", "opcode INST"),
    "OBJ": (P + b"(o.", "opcode OBJ"),
    "NEWOBJ": (P + b")\x81.", "opcode NEWOBJ"),
    "NEWOBJ_EX": (P + b")}\x92.", "opcode NEWOBJ_EX"),
    "EXT1": (P + b"\x82\1.", "opcode EXT1"),
    "PERSID": (P + b"Px\n.", "opcode PERSID"),
    "text integer": (P + b"I" + b"9" * 100_000 + b"\n.", "opcode INT"),
    "text long": (P + b"L" + b"9" * 100_000 + b"L\n.", "opcode LONG"),
    "long of 255 bytes": (P + b"\x8a\xff" + b"\xff" * 255 + b".", "integer of 255 bytes"),
    "LONG4": (P + b"\x8b\xff\xff\xff\x7f.", "opcode LONG4"),
    "underflow": (P + b"0.", "opcode POP"),
    "tuple of nothing": (P + b"\x85.", "empty stack"),
    "append to nothing": (P + b"a.", "empty stack"),
    "items without a mark": (P + b"}u.", "empty stack"),
    "items below the mark": (P + b"](K\1\x86.", "empty stack"),
    "append to a dict": (P + b"}K\1a.", "put into a dict"),
    "items into a list": (P + b"]K\1K\1s.", "put into a list"),
    "items into a tuple": (P + b")(K\1e.", "put into a tuple"),
    "key without a value": (P + b"}(K\1u.", "key without a value"),
    "list as a key": (P + b"}]K\1s.", r"key \(list\)"),
    "tuple as a key": (P + b"})K\1s.", r"key \(tuple\)"),
    "float as a key": (P + b"}G" + bytes(8) + b"K\1s.", "key 0.0"),
    "large integer as a key": (P + b"}J\xff\xff\xff\x7fK\1s.", "key 2147483647"),
    "memo missing": (P + b"h\5.", "object 5"),
    "memo of nothing": (P + b"q\0.", "empty stack"),
    "memo number huge": (P + b"}r\xff\xff\xff\xff.", "number 4294967295"),
    "text past the end": (P + b"X\xff\xff\xff\xff.", "ends inside 4294967295 bytes"),
    "text of 2^64-1": (P + b"\x8d" + b"\xff" * 8 + b".", "ends inside"),
    "bytes past the end": (P + b"B\xff\xff\xff\x7f.", "ends inside"),
    "text not UTF-8": (P + b"X\1\0\0\0\xff.", "not UTF-8"),
    "text with a surrogate": (P + b"X\3\0\0\0\xed\xa0\x80.", "not UTF-8"),
    "frame past the end": (b"\x80\x04\x95" + b"\xff" * 8 + b".", "frame"),
    "operand cut": (P + b"J\0\0", "ends too early"),
    "global without an end": (P + b"ccollections", "has no end"),
    "global name of a megabyte": (P + b"c" + b"x" * (1 << 20) + b"\nx\n.", "has no end"),
    "global name no text": (b"\x80\x04K\1K\2\x93.", "name is no text"),
    "reduce without a tuple": (P + b"ccollections\nOrderedDict\n]R.", "no argument tuple"),
    "external object no tuple": (P + b"K\1Q.", "no storage"),
    "external object of another kind": (P + b"(X\4\0\0\0fileX\1\0\0\0aNNNtQ.", "no storage"),
    "marks to the sky": (P + b"(" * 950_000, "containers are open"),
    "lists to the sky": (P + b"]" * 950_000 + b"a" * 99_000 + b".", "one object"),
    "too many steps": (P + b"N" * MAX_OPCODES + b".", "steps"),
}


@pytest.mark.parametrize("name", BAD_PICKLES)
def test_bad_pickles(tmp_path: Path, quick: None, name: str) -> None:
    data, message = BAD_PICKLES[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(write(tmp_path / "x.bin", torch_zip_bytes(data)))
    assert caught.value.offset is not None
    assert 0 <= caught.value.offset <= (tmp_path / "x.bin").stat().st_size


def test_deep_shared_and_endless_structures_are_harmless(tmp_path: Path, quick: None) -> None:
    w = dumps({"w": tensor(GOOD, 0, (6,), (1,))})[2:-1]
    key = b"X\1\0\0\0x"
    deep = b"]" * 100_000 + b"a" * 99_999  # a list in a list in a list ...
    shared = b")q\0" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(100))  # 2^100 leaves
    cycle = b"]q\0h\0a"
    for part in (deep, shared, cycle):
        data = torch_zip_bytes(P + w + key + part + b"s.", {"0": bytes(24)})
        with open_checkpoint(write(tmp_path / "x.bin", data)) as c:
            assert c.tensors["w"].read_f32().tolist() == [0] * 6
            with pytest.raises(CheckpointError, match=r"too large|too deep"):
                _ = c.extra


def test_one_huge_argument_used_again_and_again_costs_nothing(tmp_path: Path, quick: None) -> None:
    huge = b"(" + b"K\1" * 500_000 + b"tq\0" + b"\x85q\1"  # a tuple of a tuple of 500,000 ones
    calls = b"ctorch\nSize\nq\2h\1R"
    text = b"X" + (1 << 20).to_bytes(4, "little") + b"x" * (1 << 20) + b"\x85q\1"
    devices = b"ctorch\ndevice\nq\2h\1R"
    for attack in (huge + calls, text + devices):
        with pytest.raises(CheckpointError, match=r"500000 dimensions|no device name"):
            load_pickle(P + attack + b".", tmp_path / "x", 0)


def test_dict_keys_cannot_be_made_to_collide(quick: None) -> None:
    items = b"".join(b"J" + (i << 4).to_bytes(4, "little") + b"N" for i in range(60_000))
    assert len(load_pickle(P + b"}(" + items + b"u.", Path("x"), 0)) == 60_000


OPCODES = st.sampled_from(
    [
        bytes([c])
        for c in b"()}]tausebNRQ.qhrjKJMXGcCB\x85\x86\x87\x88\x89\x8a\x8c\x8d\x93\x94\x95\x81\x82oiP0"
    ]
    + [b"q\0", b"h\0", b"K\1", b"h\1", b"q\1", b"X\1\0\0\0w", b"\x8c\7storage", b"X\1\0\0\x000"]
    + [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n"]
    + [b"ctorch\nSize\n", b"ctorch._utils\n_rebuild_parameter\n", b"cos\nsystem\n"]
)


@settings(max_examples=500)
@given(st.lists(OPCODES | st.binary(max_size=3), max_size=40))
def test_any_sequence_of_opcodes(parts: list[bytes]) -> None:
    try:
        load_pickle(P + b"".join(parts) + b".", Path("x"), 0)
    except CheckpointError as e:
        assert e.offset is not None


# Zip archives.


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
