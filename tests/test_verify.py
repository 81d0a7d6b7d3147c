"""azquant.evaluate: soundness of files and errors against a source, judged by ggml and the gguf package."""

from __future__ import annotations

import ctypes
import hashlib
import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from convert_support import GPT2_CONFIG, gpt2_tensors, write_checkpoint
from gguf_builder import STRING, info, pair, text
from gguf_builder import gguf as build

import azquant
from azquant.errors import ArgumentError, ConversionError, GGUFError, InputFileError, OutputError
from azquant.evaluate import plot_file, plot_verification, tensor_sha256, verify
from azquant.evaluate.scales import count_not_finite
from azquant.gguf import TensorSpec, keys, open_gguf, split_gguf, write_gguf
from azquant.types import TYPES, get_type

PNG = b"\x89PNG"


def write(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]], **metadata: Any) -> Path:
    specs = [TensorSpec(name, shape, get_type(kind)) for name, (kind, shape, _) in tensors.items()]
    write_gguf(path, metadata, specs, lambda spec: [tensors[spec.name][2]])
    return path


# Scales


@pytest.mark.parametrize("name", [name for name in TYPES if name not in ("f64", "q8_1")])
def test_finite_scales_as_ggml_sees_them(name: str) -> None:
    """ggml_validate_row_data refuses exactly the blocks that are counted here (it knows no q8_1)."""
    xllamacpp = pytest.importorskip("xllamacpp")
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    validate = library.ggml_validate_row_data
    validate.restype = ctypes.c_bool
    validate.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    kind = get_type(name)
    rng = np.random.default_rng(7)
    refused = 0
    for _ in range(200):
        data = np.frombuffer(rng.bytes(2 * kind.block_bytes), np.uint8).copy()
        odd = rng.random(data.size) < 0.3
        data[odd] = rng.choice([0x7C, 0xFC, 0x7F, 0xFF, 0x80, 0x00], odd.sum())
        theirs = validate(kind.id, data.ctypes.data, data.nbytes)
        assert (count_not_finite(data, kind)[0] == 0) == theirs
        refused += not theirs
    if name not in ("i8", "i16", "i32", "i64", "nvfp4"):
        assert refused > 3


@pytest.mark.parametrize(("name", "dtype"), [("f64", "<f8"), ("f32", "<f4"), ("f16", "<f2")])
def test_count_and_first_of_plain_types(name: str, dtype: str) -> None:
    values = np.ones(70_000 * 32, dtype)  # more than one piece
    values[[5, 2_200_000]] = np.nan, -np.inf
    assert count_not_finite(values.view(np.uint8), get_type(name)) == (2, 5)
    assert count_not_finite(values.view(np.uint8)[: 5 * values.itemsize], get_type(name)) == (0, -1)


def test_a_bad_scale_is_located(tmp_path: Path) -> None:
    blocks = bytearray(18 * 4)
    blocks[18 * 2 : 18 * 2 + 2] = struct.pack("<e", math.nan)
    path = write(tmp_path / "bad.gguf", {"w": ("q4_0", (2, 64), bytes(blocks)), "f": ("f32", (1,), bytes(4))})
    report = verify(path)
    with open_gguf(path) as file:
        at = file.tensors["w"].offset + 36
    assert not report.ok
    assert report.problems == (
        "tensor 'w': 1 blocks have a scale that is not finite, the first is number 2 "
        f"(at byte {at} of bad.gguf)",
    )


# Errors against a source


def test_errors_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    weights = np.random.default_rng(3).standard_normal((40, 96), dtype=np.float32)
    weights[7, 9] = 30
    blocks = gguf.quantize(weights, gguf.GGMLQuantizationType.Q4_0)
    back = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0).astype(np.float64)
    path = write(tmp_path / "q.gguf", {"w": ("q4_0", weights.shape, blocks.tobytes())})
    source = write(tmp_path / "f.gguf", {"w": ("f32", weights.shape, weights.tobytes())})
    (check,) = verify(path, source).tensors
    difference = back - weights
    assert check.errors is not None
    assert check.errors.rmse == pytest.approx(math.sqrt((difference**2).mean()), rel=1e-12)
    assert check.errors.max_error == np.abs(difference).max()
    assert check.errors.max_index == np.abs(difference).argmax()
    signal = (weights.astype(np.float64) ** 2).sum()
    assert check.errors.snr_db == pytest.approx(10 * math.log10(signal / (difference**2).sum()), rel=1e-12)
    assert check.reproduced is True
    assert check.source_type == "f32"


def test_one_changed_byte_is_seen(tmp_path: Path) -> None:
    weights = np.random.default_rng(4).standard_normal((4, 64), dtype=np.float32)
    blocks = bytearray(gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0).tobytes())
    source = write(tmp_path / "f.gguf", {"w": ("f32", weights.shape, weights.tobytes())})
    before = verify(write(tmp_path / "a.gguf", {"w": ("q8_0", (4, 64), bytes(blocks))}), source).tensors[0]
    blocks[34 * 3 + 5] ^= 1
    after = verify(write(tmp_path / "b.gguf", {"w": ("q8_0", (4, 64), bytes(blocks))}), source).tensors[0]
    assert (before.reproduced, after.reproduced) == (True, False)
    assert before.errors is not None
    assert after.errors is not None
    assert after.errors.rmse != before.errors.rmse


def test_large_tensors_are_compared_in_bands(tmp_path: Path) -> None:
    weights = np.zeros((3, 1 << 20), np.float32)
    weights[2, 12345] = 1
    other = weights.copy()
    other[1, 7] = 0.5
    path = write(tmp_path / "a.gguf", {"w": ("f32", weights.shape, weights.tobytes())})
    source = write(tmp_path / "b.gguf", {"w": ("f32", weights.shape, other.tobytes())})
    (check,) = verify(path, source).tensors
    assert check.errors is not None
    assert check.errors.max_error == 0.5
    assert check.errors.max_index == (1 << 20) + 7
    assert check.reproduced is False


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_a_conversion_reproduces_its_checkpoint(tmp_path: Path, shared_data: Path, kind: str) -> None:
    source = shared_data / "az_llm_small"
    path = tmp_path / "model.gguf"
    azquant.convert(source, path, kind)
    report = verify(path, source, hashes=True)
    assert report.ok
    assert report.notes == ()
    assert all(check.reproduced for check in report.tensors)
    floor = {"f32": math.inf, "f16": 60, "bf16": 45, "q8_0": 40, "q4_0": 18}[kind]
    assert min(check.errors.snr_db for check in report.tensors if check.errors) >= floor


def test_a_model_that_another_made_from_the_same_checkpoint(shared_data: Path) -> None:
    folder = shared_data / "stories260K"
    report = verify(folder / "stories260K-F32.gguf", folder / "hf")
    assert report.ok
    assert all(check.errors is not None and check.errors.rmse == 0 for check in report.tensors)


def test_what_only_one_side_has(tmp_path: Path) -> None:
    one = ("f32", (2,), bytes(8))
    path = write(tmp_path / "a.gguf", {"x": one, "y": one, "z": one})
    source = write(tmp_path / "b.gguf", {"x": one, "z": ("f32", (1, 2), bytes(8)), "w": one})
    assert set(verify(path, source).problems) == {
        "tensor 'w' of the source is missing",
        "tensor 'y' is not in the source",
        "tensor 'z' has shape (2,); in the source it has (1, 2)",
    }
    with pytest.raises(ArgumentError, match="no tensor in common"):
        verify(path, write(tmp_path / "c.gguf", {"other": one}))


def test_types_without_a_decoder(tmp_path: Path) -> None:
    kind = next((name for name in ("iq1_m", "tq1_0", "iq2_xxs") if not get_type(name).can_dequantize), None)
    if kind is None:
        pytest.skip("every type has a decoder")
    size = get_type(kind).block_bytes
    path = write(tmp_path / "a.gguf", {"w": (kind, (256,), bytes(size))})
    assert verify(path, path).tensors[0].errors == (0.0, 0.0, -1, math.inf)
    other = write(tmp_path / "b.gguf", {"w": (kind, (256,), bytes(size - 1) + b"\1")})
    assert verify(path, other).notes[-1] == f"tensor 'w' differs from the source, and {kind} has no decoder"
    plain = write(tmp_path / "c.gguf", {"w": ("f32", (256,), bytes(1024))})
    assert verify(path, plain).notes[-1] == f"tensor 'w' was not compared: {kind} has no decoder"


def test_nan_in_the_source_is_a_problem(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", {"w": ("f32", (2,), bytes(8))})
    source = write(tmp_path / "b.gguf", {"w": ("f32", (2,), struct.pack("<2f", 0, math.nan))})
    report = verify(path, source)
    assert report.problems == ("tensor 'w' or its source holds NaN or infinity: no error to give",)
    assert report.tensors[0].errors is None


# The file as a whole


def test_a_header_only_file_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "head.gguf"
    path.write_bytes(build([], [info("a", [8])], b""))
    report = verify(path, hashes=True)
    assert report.problems == ("the file is a header only: its tensors have no data",)
    assert report.tensors[0].sha256 is None


def test_bytes_that_belong_to_nothing_are_noted(tmp_path: Path) -> None:
    path = tmp_path / "gaps.gguf"
    path.write_bytes(build([], [info("a", [8], 0, 64), info("b", [3])], bytes(96) + b"rest"))
    notes = verify(path).notes
    assert "32 bytes between tensors belong to none" in notes
    assert "4 bytes after the last tensor belong to none" in notes


def test_texts_that_are_not_utf8_are_noted(tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_bytes(build([pair("s", STRING, text(b"\xff")), pair("t", STRING, text("ə"))]))
    assert "key 's' holds 1 text that are not UTF-8" in verify(path).notes


def test_models_made_wrong_have_problems(shared_data: Path) -> None:
    """Classes 31 to 38: the file is well-formed, the model is not."""
    paths = sorted((shared_data / "bad-gguf/model-level").glob("SEMREJECT*.gguf"))
    assert len(paths) > 5
    wrong = {path.name: verify(path).problems for path in paths}
    assert [name for name, problems in wrong.items() if not problems] == []


def test_a_split_model_is_verified_as_one(tmp_path: Path, shared_data: Path) -> None:
    source = shared_data / "stories260K/stories260K-F32.gguf"
    shards = split_gguf(source, tmp_path / "cut", max_tensors=10)
    report = verify(shards[0], source, hashes=True)
    assert report.ok
    whole = verify(source, hashes=True)
    assert [check.sha256 for check in report.tensors] == [check.sha256 for check in whole.tensors]


def test_hashes_are_of_the_bytes_in_the_file(tmp_path: Path) -> None:
    tensors = {"w": ("f32", (3,), struct.pack("<3f", 1, 2, 3)), "n": ("f32", (0,), b"")}
    path = write(tmp_path / "a.gguf", tensors)
    with open_gguf(path) as file:
        w, n = file.tensors["w"], file.tensors["n"]
        assert tensor_sha256(w) == hashlib.sha256(path.read_bytes()[w.offset : w.offset + 12]).hexdigest()
        assert tensor_sha256(n) == hashlib.sha256().hexdigest()


def test_progress_counts_the_bytes_of_tensors(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    path = write(tmp_path / "a.gguf", {"a": ("f32", (3,), bytes(12)), "b": ("f32", (5,), bytes(20))})
    verify(path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(0, 32), (12, 32), (32, 32)]


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", {"w": ("f32", (2,), bytes(8))})
    with pytest.raises(InputFileError):
        verify(path, tmp_path / "gone")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(GGUFError):
        verify(path, tmp_path / "bad.gguf")
    folder = write_checkpoint(tmp_path / "folder", None, gpt2_tensors(GPT2_CONFIG))
    with pytest.raises(ConversionError, match=r"no config\.json"):
        verify(path, folder)


# Pictures


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    weights = np.random.default_rng(3).standard_normal((4, 64), dtype=np.float32)
    blocks = gguf.quantize(weights, gguf.GGMLQuantizationType.Q4_0).tobytes()
    names = ["token_embd.weight", "blk.0.ffn_up.weight", "blk.10.ffn_up.weight", "output.weight", "$x^"]
    path = write(tmp_path / "a.gguf", dict.fromkeys(names, ("q4_0", (4, 64), blocks)))
    source = write(tmp_path / "b.gguf", {name: ("f32", (4, 64), weights.tobytes()) for name in names})
    with open_gguf(path) as file:
        plot_file(file, tmp_path / "types.png")
        plot_file(file, tmp_path / "types.svg")
        with pytest.raises(OutputError, match="already exists"):
            plot_file(file, tmp_path / "types.png")
        with pytest.raises(ArgumentError, match=r"\.png, \.svg or \.pdf"):
            plot_file(file, tmp_path / "types.jpeg")
    plot_verification(verify(path, source), tmp_path / "errors.png")
    plot_verification(verify(path, path), tmp_path / "exact.png")
    for name in ("types.png", "errors.png", "exact.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
    assert "<svg" in (tmp_path / "types.svg").read_text()
    with pytest.raises(ArgumentError, match="nothing was compared"):
        plot_verification(verify(path), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_picture_of_a_file_without_tensors(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = write(tmp_path / "a.gguf", {}, k=keys.u8(1))
    with open_gguf(path) as file:
        plot_file(file, tmp_path / "none.png")
    assert (tmp_path / "none.png").read_bytes().startswith(PNG)
