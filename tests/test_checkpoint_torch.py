"""Reading torch's zip files without torch: values against torch, views, nesting, byte order."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import (
    ORDERED_DICT,
    Call,
    Global,
    Storage,
    dumps,
    tensor,
    torch_zip_bytes,
    write,
)
from hypothesis import given
from hypothesis import strategies as st

from azquant.checkpoint import LazyTensor, open_checkpoint, source
from azquant.checkpoint import tensor as tensor_module
from azquant.errors import CheckpointError

ROOT = Path(__file__).resolve().parent.parent

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
INTS = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def save(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


@pytest.mark.parametrize("name", FLOATS)
def test_float_types(tmp_path: Path, name: str) -> None:
    values = (torch.randn(5, 7) * 3).to(FLOATS[name])
    with open_checkpoint(save(tmp_path / "x.bin", {"w": values})) as c:
        assert c.format == "torch"
        assert c.tensors["w"].dtype == name
        assert c.tensors["w"].nbytes == values.numel() * values.itemsize
        assert np.array_equal(c.tensors["w"].read_f32(), values.float().numpy())
        assert np.array_equal(c.tensors["w"].read_f32(2, 4), values[2:4].float().numpy())


@pytest.mark.parametrize("name", INTS)
def test_integer_types(tmp_path: Path, name: str) -> None:
    values = torch.tensor([[0, 1, 2], [3, 100, 127]]).to(INTS[name])
    with open_checkpoint(save(tmp_path / "x.bin", {"w": values})) as c:
        assert c.tensors["w"].dtype == name
        assert np.array_equal(c.tensors["w"].read(), values.numpy())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols_and_real_modules(tmp_path: Path, protocol: int) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = module.state_dict()  # an OrderedDict with a _metadata attribute, which pickles as BUILD
    assert hasattr(state, "_metadata")
    with open_checkpoint(save(tmp_path / "x.bin", state, pickle_protocol=protocol)) as c:
        assert list(c.tensors) == list(state)
        for name, values in state.items():
            assert np.array_equal(c.tensors[name].read(), values.numpy()), name


def test_parameters_and_parameters_with_attributes(tmp_path: Path) -> None:
    plain, marked = torch.nn.Parameter(torch.randn(2, 2)), torch.nn.Parameter(torch.randn(3))
    marked.note = "kept by torch"  # type: ignore[attr-defined]
    with open_checkpoint(save(tmp_path / "x.bin", {"plain": plain, "marked": marked})) as c:
        assert np.array_equal(c.tensors["plain"].read_f32(), plain.detach().numpy())
        assert np.array_equal(c.tensors["marked"].read_f32(), marked.detach().numpy())


VIEWS = {
    "transposed": lambda x: x.t(),
    "row slice": lambda x: x[3:9],
    "column slice": lambda x: x[:, 2:5],
    "one column": lambda x: x[:, 4],
    "one element": lambda x: x[4, 5],
    "every third row": lambda x: x[::3],
    "every second column": lambda x: x[:, ::2],
    "transposed slice": lambda x: x[2:11:2, 1:6].t(),
    "split heads": lambda x: x.view(12, 2, 4).permute(1, 0, 2),
    "expanded": lambda x: x[:, :1].expand(12, 8),
    "expanded row": lambda x: x[3].expand(5, 8),
    "diagonal": lambda x: x.diagonal(),
    "overlapping": lambda x: x.as_strided((6, 4), (2, 1)),
    "ones": lambda x: x[:1, :1].as_strided((1, 1), (7, 9)),
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_views(tmp_path: Path, name: str, dtype: str) -> None:
    base = torch.randn(12, 8).to(FLOATS[dtype])
    view = VIEWS[name](base)
    with open_checkpoint(save(tmp_path / "x.bin", {"v": view})) as c:
        t = c.tensors["v"]
        assert t.shape == tuple(view.shape)
        got = t.read_f32()
        assert got.flags.c_contiguous
        assert np.array_equal(got, view.float().numpy())
        for start in range(len(view) if view.ndim else 0):
            assert np.array_equal(
                t.read_f32(start, start + 2 if start + 2 <= len(view) else None),
                view[start : start + 2].float().numpy(),
            )


@given(data=st.data())
def test_any_view(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    base = torch.arange(int(np.prod(sizes)), dtype=torch.float32).reshape(sizes)
    view = base.permute(*data.draw(st.permutations(range(len(sizes)))))
    for axis in range(view.ndim):
        start = data.draw(st.integers(0, view.shape[axis] - 1))
        step = data.draw(st.integers(1, 3))
        view = view[(slice(None),) * axis + (slice(start, None, step),)]
    path = save(tmp_path_factory.mktemp("view") / "x.bin", {"v": view})
    first = data.draw(st.integers(0, view.shape[0]))
    last = data.draw(st.integers(first, view.shape[0]))
    # Bands of a few bytes, so that small tensors go through many.
    with pytest.MonkeyPatch.context() as patch, open_checkpoint(path) as c:
        patch.setattr(tensor_module, "_BAND", data.draw(st.sampled_from([4, 16, 64, 1 << 22])))
        assert np.array_equal(c.tensors["v"].read_f32(), view.numpy())
        assert np.array_equal(c.tensors["v"].read(first, last), view[first:last].numpy())


def test_a_transposed_tensor_is_read_in_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.randn(300, 40)
    largest = 0
    real = source.FileSource.read_into

    def watching(self: source.FileSource, offset: int, out: memoryview) -> None:
        nonlocal largest
        largest = max(largest, out.nbytes)
        real(self, offset, out)

    with open_checkpoint(save(tmp_path / "x.bin", {"v": base.t()})) as c:
        monkeypatch.setattr(tensor_module, "_BAND", 4096)
        monkeypatch.setattr(source.FileSource, "read_into", watching)
        assert np.array_equal(c.tensors["v"].read_f32(), base.t().numpy())
    assert 0 < largest <= 4096


def test_tied_weights_share_their_bytes(tmp_path: Path) -> None:
    shared = torch.randn(6, 4)
    state = {"wte": shared, "head": shared, "rows": shared[2:4]}
    path = save(tmp_path / "x.bin", state)
    assert path.stat().st_size < 3000
    with open_checkpoint(path) as c:
        for name, values in state.items():
            assert np.array_equal(c.tensors[name].read_f32(), values.numpy())


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "module"])
def test_a_state_dict_beside_other_things(tmp_path: Path, key: str) -> None:
    state = OrderedDict(a=torch.randn(2, 3), b=torch.ones(2))
    others = {
        "model_args": {"n_layer": 2, "bias": False, "dropout": 0.5, "big": 1 << 62, "low": -(1 << 40)},
        "best_val_loss": torch.tensor(1.25),  # a tensor beside the state dict must not be taken for it
        "iter_num": 5000,
        "list": [1, (2, None), "ə"],
        "size": torch.Size([3, 4]),
        "device": torch.device("cpu"),
        "optimizer": {"state": {0: {"exp_avg": torch.randn(2, 3), "step": torch.tensor(7.0)}}},
    }
    with open_checkpoint(save(tmp_path / "ckpt.pt", {key: state, **others})) as c:
        assert list(c.tensors) == ["a", "b"]
        extra = c.extra
        assert extra["model_args"] == others["model_args"]
        assert extra["iter_num"] == 5000
        assert extra["list"] == [1, (2, None), "ə"]
        assert extra["size"] == (3, 4)
        assert extra["device"] == "cpu"
        assert key not in extra
        assert extra["best_val_loss"].read_f32() == 1.25
        average = extra["optimizer"]["state"][0]["exp_avg"]
        assert isinstance(average, LazyTensor)
        assert average.name == "optimizer.state.0.exp_avg"
        assert np.array_equal(average.read_f32(), others["optimizer"]["state"][0]["exp_avg"].numpy())


def test_what_is_no_tensor_in_a_state_dict_goes_to_extra(tmp_path: Path) -> None:
    with open_checkpoint(save(tmp_path / "x.bin", {"a": torch.ones(2), "version": 3})) as c:
        assert list(c.tensors) == ["a"]
        assert c.extra == {"version": 3}
    with open_checkpoint(save(tmp_path / "y.bin", {"model": {"a": torch.ones(2), "version": 3}})) as c:
        assert c.extra == {"model": {"version": 3}}


def test_big_endian_files(tmp_path: Path) -> None:
    values = np.arange(12).reshape(3, 4) - 5
    state = {
        "f": tensor(Storage("FloatStorage", "0", 12), 0, (3, 4), (4, 1)),
        "t": tensor(Storage("FloatStorage", "0", 12), 0, (4, 3), (1, 4)),
        "i": tensor(Storage("LongStorage", "1", 12), 0, (3, 4), (4, 1)),
        "b": tensor(Storage("BFloat16Storage", "2", 2), 0, (2,), (1,)),
    }
    storages = {
        "0": values.astype(">f4").tobytes(),
        "1": values.astype(">i8").tobytes(),
        "2": b"\x3f\x80\xc0\x00",
    }
    path = write(tmp_path / "x.bin", torch_zip_bytes(dumps(state), storages, others={"byteorder": b"big"}))
    with open_checkpoint(path) as c:
        assert np.array_equal(c.tensors["f"].read_f32(1, 3), values[1:])
        assert np.array_equal(c.tensors["t"].read_f32(), values.T)
        integers = c.tensors["i"].read()
        assert integers.dtype == np.int64 and integers.dtype.isnative
        assert np.array_equal(integers, values)
        assert c.tensors["b"].read_f32().tolist() == [1.0, -2.0]


def test_files_without_a_byte_order_are_little_endian(tmp_path: Path) -> None:
    state = Call(ORDERED_DICT, state={"_metadata": {}})
    state = {"w": tensor(Storage("FloatStorage", "k", 2), 0, [2], [1]), "hooks": state}
    path = write(tmp_path / "x.bin", torch_zip_bytes(dumps(state), {"k": struct.pack("<2f", 1.5, -2)}))
    with open_checkpoint(path) as c:
        assert c.tensors["w"].read_f32().tolist() == [1.5, -2.0]


def test_the_untyped_storages_of_newer_files(tmp_path: Path) -> None:
    storage = Storage("UntypedStorage", "0", 8, module="torch.storage")
    rebuild = Global("torch._utils", "_rebuild_tensor_v3")
    state = {"w": Call(rebuild, storage, 1, (3,), (1,), False, Call(ORDERED_DICT), Global("torch", "uint16"))}
    path = write(tmp_path / "x.bin", torch_zip_bytes(dumps(state), {"0": struct.pack("<4H", 9, 8, 7, 6)}))
    with open_checkpoint(path) as c:
        assert c.tensors["w"].read().tolist() == [8, 7, 6]


def test_sizes_in_the_zip64_field_are_honoured(tmp_path: Path) -> None:
    """Members beyond 4 GiB: every 32-bit size and offset of the directory is 0xffffffff, the field has it."""
    path = save(tmp_path / "x.bin", {"w": torch.arange(4.0)})
    old = path.read_bytes()
    end64 = old.rfind(b"PK\6\6")
    count, _, start = struct.unpack_from("<3Q", old, end64 + 32)
    directory, at = b"", start
    for _ in range(count):
        fields = list(struct.unpack_from("<4s6H3I5H2I", old, at))
        name = old[at + 46 : at + 46 + fields[10]]
        at += 46 + sum(fields[10:13])
        wide = struct.pack("<2H3Q", 1, 24, fields[9], fields[8], fields[16])
        fields[8] = fields[9] = fields[16] = 0xFFFFFFFF
        extra = struct.pack("<2H3s", 0x4242, 3, b"abc") + wide  # another field first
        fields[11], fields[12] = len(extra), 0
        directory += struct.pack("<4s6H3I5H2I", *fields) + name + extra
    end = bytearray(old[end64:])
    struct.pack_into("<2Q", end, 40, len(directory), start)
    struct.pack_into("<Q", end, 56 + 8, start + len(directory))
    struct.pack_into("<2H2I", end, 76 + 8, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
    path.write_bytes(old[:start] + directory + end)
    with open_checkpoint(path) as c:
        assert c.tensors["w"].read_f32().tolist() == [0, 1, 2, 3]


def test_shards(tmp_path: Path) -> None:
    save(tmp_path / "pytorch_model-00001-of-00002.bin", {"a": torch.ones(2, 2)})
    save(tmp_path / "pytorch_model-00002-of-00002.bin", {"b": torch.zeros(3)})
    weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with open_checkpoint(tmp_path) as c:
        assert c.format == "torch"
        assert list(c.tensors) == ["a", "b"]
        assert c.tensors["b"].read_f32().tolist() == [0, 0, 0]


def test_stories260k_is_the_same_in_both_formats(shared_data: Path) -> None:
    folder = shared_data / "stories260K" / "hf"
    with (
        open_checkpoint(folder / "model.safetensors") as s,
        open_checkpoint(folder / "pytorch_model.bin") as t,
    ):
        assert (s.format, t.format) == ("safetensors", "torch")
        assert s.config == t.config and t.config is not None
        assert s.tensors.keys() == t.tensors.keys()
        expected = torch.load(folder / "pytorch_model.bin", weights_only=True)
        for name in s.tensors:
            assert np.array_equal(s.tensors[name].read_f32(), t.tensors[name].read_f32()), name
            assert np.array_equal(t.tensors[name].read_f32(), expected[name].numpy()), name


def test_torch_is_not_needed_and_not_imported(tmp_path: Path) -> None:
    values = torch.randn(4, 4).to(torch.bfloat16)
    path = save(tmp_path / "pytorch_model.bin", {"w": values, "p": torch.nn.Parameter(values.float())})
    program = (
        "import sys; sys.modules['torch'] = None\n"  # any import of it now fails
        "from azquant.checkpoint import open_checkpoint\n"
        f"with open_checkpoint({str(path)!r}) as c: print(c.tensors['w'].read_f32().sum())\n"
        "assert sys.modules.pop('torch') is None\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('torch', 'safetensors', 'pickle5')]\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(values.float().sum().item(), rel=1e-5)


def test_reading_rows_of_a_contiguous_tensor_reads_only_them(tmp_path: Path) -> None:
    with open_checkpoint(save(tmp_path / "x.bin", {"w": torch.randn(100, 16)})) as c:
        sizes: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            real = source.FileSource.read_into
            patch.setattr(
                source.FileSource,
                "read_into",
                lambda s, o, out: (sizes.append(out.nbytes), real(s, o, out))[1],
            )
            c.tensors["w"].read_f32(7, 9)
        assert sizes == [2 * 16 * 4]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2), "holds one tensor"),
        ([torch.ones(2)], "holds one list"),
        ({"a": 1, "b": {"c": torch.ones(1)}}, r"top-level keys are: 'a', 'b'"),
        ({}, "top-level keys are: none"),
    ],
)
def test_files_without_a_state_dict_say_what_they_hold(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(save(tmp_path / "x.bin", value))
