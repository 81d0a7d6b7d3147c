"""Reading safetensors: values against safetensors and torch, row ranges, shards, folders."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from checkpoint_files import entry, safetensors_bytes, write
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from azquant.checkpoint import LazyTensor, open_checkpoint, source
from azquant.errors import ArgumentError, CheckpointError, InputFileError

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
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all reads from checkpoint files."""
    sizes: list[int] = []
    real = source.FileSource.read_into

    def counting(self: source.FileSource, offset: int, out: memoryview) -> None:
        sizes.append(out.nbytes)
        real(self, offset, out)

    monkeypatch.setattr(source.FileSource, "read_into", counting)
    return sizes


def same_floats(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bit for bit, except that any NaN equals any NaN."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    if a.shape != b.shape or a.dtype != np.float32 or b.dtype != np.float32:
        return False
    nan = np.isnan(a)
    return bool(np.array_equal(nan, np.isnan(b)) and np.array_equal(a.view("u4")[~nan], b.view("u4")[~nan]))


@pytest.mark.parametrize("name", ["F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_every_bit_pattern_of_the_small_floats_is_exact(tmp_path: Path, name: str) -> None:
    wide = FLOATS[name].itemsize == 2
    bits = np.arange(1 << 16, dtype="u2") if wide else np.arange(256, dtype="u1")
    values = torch.from_numpy(bits.copy()).view(FLOATS[name])
    safetensors.torch.save_file({"w": values}, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as c:
        assert c.tensors["w"].dtype == name
        assert same_floats(c.tensors["w"].read_f32(), values.float().numpy())
        if name != "F16":
            assert np.array_equal(c.tensors["w"].read(), bits)


@pytest.mark.parametrize("name", ["F32", "F64"])
def test_wide_floats(tmp_path: Path, name: str) -> None:
    special = [0.0, -0.0, 1e-45, 1e-320, 3.4e38, -np.inf, np.nan, 1 / 3, 1 + 2**-24, 16777217.0]
    values = torch.tensor(special, dtype=FLOATS[name])
    safetensors.torch.save_file({"w": values}, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as c:
        assert same_floats(c.tensors["w"].read_f32(), values.float().numpy())


def test_f64_beyond_the_range_of_f32_becomes_infinite_without_a_warning(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"w": np.array([1e300, -1e300])}, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as c:
        assert c.tensors["w"].read_f32().tolist() == [np.inf, -np.inf]


@pytest.mark.parametrize("name", INTS)
def test_integers_are_read_as_they_are_and_never_as_floats(tmp_path: Path, name: str) -> None:
    values = torch.tensor([[0, 1, 2], [3, 100, 127]]).to(INTS[name])
    safetensors.torch.save_file({"w": values}, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as c:
        t = c.tensors["w"]
        assert t.dtype == name
        got = t.read()
        assert got.dtype == values.numpy().dtype
        assert np.array_equal(got, values.numpy())
        assert np.array_equal(t.read(1, 2), values.numpy()[1:2])
        with pytest.raises(CheckpointError, match=f"'w' holds {name}"):
            t.read_f32()


def test_any_non_zero_byte_is_true(tmp_path: Path) -> None:
    path = write(tmp_path / "x", safetensors_bytes({"w": entry([3], 0, 3, "BOOL")}, b"\0\2\1"))
    with open_checkpoint(path) as c:
        assert c.tensors["w"].read().tobytes() == b"\0\1\1"


@given(
    values=hnp.arrays(
        st.sampled_from(["<f4", "<f2", "<f8", "<i4", "<i8", "i1"]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    ),
    data=st.data(),
)
def test_any_array_and_any_rows(
    tmp_path_factory: pytest.TempPathFactory, values: np.ndarray, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    safetensors.numpy.save_file({"before": np.ones(3, "f4"), "w": values}, path)
    with open_checkpoint(path) as c:
        t = c.tensors["w"]
        assert t.shape == values.shape
        assert t.nbytes == values.nbytes
        assert np.array_equal(t.read(), values, equal_nan=values.dtype.kind == "f")
        if values.ndim:
            start = data.draw(st.integers(0, len(values)))
            stop = data.draw(st.integers(start, len(values)))
            assert t.read(start, stop).tobytes() == values[start:stop].tobytes()
            if values.dtype.kind == "f":
                with np.errstate(all="ignore"):
                    expected = values[start:stop].astype(np.float32)
                assert same_floats(t.read_f32(start, stop), expected)


def test_a_row_range_reads_only_its_own_bytes(tmp_path: Path, bytes_read: list[int]) -> None:
    values = torch.arange(1000 * 64, dtype=torch.float32).reshape(1000, 64).to(torch.bfloat16)
    safetensors.torch.save_file({"w": values}, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as c:
        bytes_read.clear()
        band = c.tensors["w"].read_f32(500, 504)
        assert sum(bytes_read) == 4 * 64 * 2
    assert np.array_equal(band, values[500:504].float().numpy())
    assert band.flags.c_contiguous


def test_tensors_longer_than_one_band(tmp_path: Path) -> None:
    values = torch.randn(3, 1_100_003).to(torch.float16)  # 6.6 MB, no multiple of the 4 MiB band
    safetensors.torch.save_file({"w": values}, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as c:
        assert np.array_equal(c.tensors["w"].read_f32(), values.float().numpy())


def test_zero_dimensional_and_empty_tensors(tmp_path: Path) -> None:
    arrays = {"scalar": np.array(2.5, "f4"), "empty": np.zeros((0, 7), "f4")}
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as c:
        scalar = c.tensors["scalar"].read_f32()
        assert scalar.shape == () and scalar == 2.5
        assert c.tensors["empty"].read_f32().shape == (0, 7)
        with pytest.raises(ArgumentError):
            c.tensors["scalar"].read_f32(0, 0)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 5), (3, 2), (5, None), (0, -1)])
def test_rows_outside_the_tensor_are_refused(tmp_path: Path, start: int, stop: int | None) -> None:
    safetensors.numpy.save_file({"w": np.zeros((4, 2), "f4")}, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as c, pytest.raises(ArgumentError, match="which has 4"):
        c.tensors["w"].read_f32(start, stop)


def test_nothing_can_be_read_after_close(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"w": np.zeros(4, "f4")}, tmp_path / "x.safetensors")
    c = open_checkpoint(tmp_path / "x.safetensors")
    c.close()
    c.close()
    with pytest.raises(InputFileError, match="cannot be read"):
        c.tensors["w"].read_f32()


def test_a_file_cut_short_after_opening_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"w": np.zeros(1000, "f4")}, path)
    with open_checkpoint(path) as c:
        os.truncate(path, 2000)
        with pytest.raises(CheckpointError, match="cut short while being read"):
            c.tensors["w"].read_f32()


def test_reading_without_pread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).standard_normal((50, 7)).astype("f4")
    safetensors.numpy.save_file({"w": values}, tmp_path / "x.safetensors")
    monkeypatch.delattr(os, "preadv", raising=False)
    with open_checkpoint(tmp_path / "x.safetensors") as c:
        assert np.array_equal(c.tensors["w"].read_f32(10, 20), values[10:20])


def test_az_llm_small_equals_the_safetensors_package(shared_data: Path) -> None:
    folder = shared_data / "az_llm_small"
    expected = safetensors.numpy.load_file(folder / "model.safetensors")
    with open_checkpoint(folder) as c:
        assert c.format == "safetensors"
        assert c.files == (folder / "model.safetensors",)
        assert c.config is not None and c.config["n_embd"] == 256
        assert dict(c.extra) == {}
        assert c.tensors.keys() == expected.keys()
        for name, values in expected.items():
            assert same_floats(c.tensors[name].read_f32(), values), name


# Folders and shards.


def make_shards(folder: Path, **shards: dict[str, np.ndarray]) -> dict[str, str]:
    """Shard files (given by name without suffix) and an index that lists all they hold."""
    weight_map = {}
    for stem, tensors in shards.items():
        safetensors.numpy.save_file(tensors, folder / f"{stem}.safetensors")
        weight_map.update(dict.fromkeys(tensors, f"{stem}.safetensors"))
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


ONE, TWO = np.full((2, 2), 1, "f4"), np.full((3,), 2, "f4")


def test_shards_are_joined_in_the_order_of_the_index(tmp_path: Path) -> None:
    make_shards(tmp_path, m1={"b": ONE}, m2={"a": TWO})
    for opened in (tmp_path, tmp_path / "model.safetensors.index.json"):
        with open_checkpoint(opened) as c:
            assert list(c.tensors) == ["b", "a"]
            assert c.files == (tmp_path / "m1.safetensors", tmp_path / "m2.safetensors")
            assert c.tensors["a"].file.name == "m2.safetensors"
            assert np.array_equal(c.tensors["a"].read_f32(), TWO)
            assert c.config is None


def test_a_shard_in_a_folder_below_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    safetensors.numpy.save_file({"a": ONE}, tmp_path / "parts" / "m1.safetensors")
    write_index(tmp_path, {"a": "parts/m1.safetensors"})
    with open_checkpoint(tmp_path) as c:
        assert np.array_equal(c.tensors["a"].read_f32(), ONE)


def test_a_tensor_the_index_forgets_is_included(tmp_path: Path) -> None:
    weight_map = make_shards(tmp_path, m1={"a": ONE, "extra": TWO}, m2={"b": ONE})
    del weight_map["extra"]
    write_index(tmp_path, weight_map)
    with open_checkpoint(tmp_path) as c:
        assert np.array_equal(c.tensors["extra"].read_f32(), TWO)


def test_the_index_decides_which_of_two_shards_a_tensor_comes_from(tmp_path: Path) -> None:
    make_shards(tmp_path, m1={"a": ONE}, m2={"a": TWO, "b": ONE})
    write_index(tmp_path, {"a": "m1.safetensors", "b": "m2.safetensors"})
    with open_checkpoint(tmp_path) as c:
        assert np.array_equal(c.tensors["a"].read_f32(), ONE)


def test_a_tensor_in_two_shards_and_not_in_the_index_is_refused(tmp_path: Path) -> None:
    make_shards(tmp_path, m1={"a": ONE, "x": ONE}, m2={"b": TWO, "x": ONE})
    write_index(tmp_path, {"a": "m1.safetensors", "b": "m2.safetensors"})
    with pytest.raises(CheckpointError, match=r"'x' is in 'm1.safetensors' and in 'm2.safetensors'"):
        open_checkpoint(tmp_path)


def test_a_tensor_the_shard_lacks_is_refused(tmp_path: Path) -> None:
    make_shards(tmp_path, m1={"a": ONE})
    write_index(tmp_path, {"a": "m1.safetensors", "gone": "m1.safetensors"})
    with pytest.raises(CheckpointError, match=r"'gone' is not in the shard 'm1.safetensors'"):
        open_checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    weight_map = make_shards(tmp_path, m1={"a": ONE}, m2={"b": TWO})
    (tmp_path / weight_map["b"]).unlink()
    with pytest.raises(InputFileError, match=r"shard 'm2.safetensors'.*no such file"):
        open_checkpoint(tmp_path)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    make_shards(tmp_path, m1={"a": ONE}, m2={"b": TWO})
    os.truncate(tmp_path / "m2.safetensors", (tmp_path / "m2.safetensors").stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"m2.safetensors: .*truncated"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../m1.safetensors",
        "../../etc/passwd",
        "/etc/passwd",
        "sub/../../m1.safetensors",
        "sub/../m1.safetensors",
        "./m1.safetensors",
        "C:\\m1.safetensors",
        "C:m1.safetensors",
        "..\\m1.safetensors",
        "\\\\host\\share\\m1.safetensors",
        "",
    ],
)
def test_shard_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder):  # so that only the name can be the reason
        safetensors.numpy.save_file({"a": ONE}, place / "m1.safetensors")
    write_index(folder, {"a": name})
    with pytest.raises(CheckpointError, match="no plain path within the folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", [".", "nul\0.safetensors", "x" * 5000, "\ud800", "\ud800/x", "a\0/x"])
def test_shard_names_that_are_no_file_names(tmp_path: Path, name: str) -> None:
    write_index(tmp_path, {"a": name})
    with pytest.raises((CheckpointError, InputFileError), match=r"index\.json"):
        open_checkpoint(tmp_path)


def test_a_linked_folder_that_leaves_is_refused(tmp_path: Path) -> None:
    folder, outside = tmp_path / "model", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    safetensors.numpy.save_file({"a": ONE}, outside / "m1.safetensors")
    (folder / "sub").symlink_to(outside, target_is_directory=True)
    write_index(folder, {"a": "sub/m1.safetensors"})
    with pytest.raises(CheckpointError, match="leaves the folder of the index through a link"):
        open_checkpoint(folder)


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    write_index(tmp_path, {"a": "loop/m1.safetensors"})
    with pytest.raises(InputFileError, match="cannot be read"):
        open_checkpoint(tmp_path)


def test_the_link_layout_of_the_hugging_face_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    weight_map = make_shards(blobs, m1={"a": ONE}, m2={"b": TWO})
    (blobs / "config.json").write_text('{"model_type": "gpt2"}')
    for name in [*weight_map.values(), "model.safetensors.index.json", "config.json"]:
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    with open_checkpoint(snapshot) as c:
        assert np.array_equal(c.tensors["b"].read_f32(), TWO)
        assert c.config == {"model_type": "gpt2"}


def test_safetensors_are_preferred_and_the_pickle_is_not_even_opened(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"a": ONE}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"garbage")
    with open_checkpoint(str(tmp_path)) as c:
        assert c.format == "safetensors"


def test_the_config_beside_a_file_is_found(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"a": ONE}, tmp_path / "odd.safetensors")
    (tmp_path / "config.json").write_text('\ufeff{"n_embd": 2}', encoding="utf-8")
    with open_checkpoint(tmp_path / "odd.safetensors") as c:
        assert c.config == {"n_embd": 2}


def test_descriptors_are_closed_when_opening_fails(tmp_path: Path) -> None:
    make_shards(tmp_path, m1={"a": ONE}, m2={"b": TWO})
    (tmp_path / "config.json").write_text("not json")
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else None
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(tmp_path)
    if before is None:
        pytest.skip("needs /proc")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_repr_and_mapping_are_plain(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"a": ONE}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as c:
        assert isinstance(c.tensors["a"], LazyTensor)
        assert repr(c.tensors["a"]) == "LazyTensor('a', shape=(2, 2), dtype='F32')"
        assert "1 tensors" in repr(c)
        with pytest.raises(TypeError):
            c.tensors["b"] = c.tensors["a"]  # type: ignore[index]
