"""Hostile and broken pickles: refused, quickly, and nothing in them is executed."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import (
    GOOD,
    ORDERED_DICT,
    REBUILD,
    SECONDS,
    Call,
    Global,
    Storage,
    dumps,
    read_all,
    tensor,
    torch_zip_bytes,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from azquant.checkpoint import open_checkpoint
from azquant.checkpoint.unpickler import MAX_OPCODES, load_pickle
from azquant.errors import CheckpointError, UnsafePickleError


@pytest.fixture
def quick() -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < SECONDS


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
    "lists to the sky": (P + b"]" * 900_000 + b"a" * 99_000 + b".", "one object"),
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
