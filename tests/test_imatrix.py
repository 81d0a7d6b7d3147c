"""Importance matrices: what is summed, the file, llama-imatrix's own sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from engine_support import tiny_model

import azquant
from azquant.errors import ArgumentError, GGUFError, InputFileError, OutputError
from azquant.evaluate import collect_imatrix
from azquant.gguf import TensorSpec, keys, write_gguf
from azquant.imatrix import Imatrix, read_imatrix, write_imatrix
from azquant.types import get_type

GOLDEN = Path(__file__).parent / "golden" / "imatrix-stories260K.json"


def text_of(n: int) -> str:
    return "".join(chr(97 + i) for i in np.random.default_rng(3).integers(0, 26, n))


def example() -> Imatrix:
    return Imatrix(
        {"blk.0.ffn_up.weight": np.array([1.0, 4.0, 0.0]), "a.weight": np.array([[2.0, 6.0], [0.0, 0.0]])},
        {"blk.0.ffn_up.weight": np.array(2.0), "a.weight": np.array([2.0, 0.0])},
        ("text.txt",),
        3,
        256,
    )


# ---- collecting


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_inputs_of_every_matrix_are_summed(tmp_path: Path, architecture: str) -> None:
    """Judged by the NumPy executor: its linears are watched one by one."""
    path = tiny_model(tmp_path, architecture, "f32", n_positions=32, max_position_embeddings=32)
    text = text_of(80)
    found = collect_imatrix(azquant.load(path, compute="fp32", kv_type="f32"), text, n_ctx=32, dataset="x")
    assert (found.chunk_count, found.chunk_size, found.datasets) == (2, 32, ("x",))
    expected = _watched(path, text, 32)
    assert set(found.sums) == set(expected)
    for name, sums in expected.items():
        np.testing.assert_allclose(found.sums[name], sums, rtol=1e-3, atol=1e-5 * sums.max())
        assert found.counts[name] == 64


def _watched(path: Path, text: str, n_ctx: int) -> dict[str, Any]:
    from azquant import _backend, _fallback, _fallback_program

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backend, "kernels", lambda: _fallback)
        for module in ("azquant.engine.weights", "azquant.engine.model", "azquant.engine.session"):
            patch.setattr(f"{module}.kernels", lambda: _fallback)
        model = azquant.load(path, compute="fp32", kv_type="f32")
        names, sums = model._weights.names(), {}
        linear = _fallback_program._Step.linear

        def watch(self: Any, op: Any) -> Any:
            name = names[id(op.w)]
            if name.startswith("blk."):
                x = self.view(op.a, op.w.shape[1]).astype(np.float64)
                sums[name] = sums.get(name, 0) + (x * x).sum(axis=0)
            return linear(self, op)

        patch.setattr(_fallback_program._Step, "linear", watch)
        tokens = model.tokenizer.encode(text)
        for at in range(0, len(tokens) // n_ctx * n_ctx, n_ctx):
            model.logits(tokens[at : at + n_ctx])
    return sums


def test_llama_imatrix_finds_the_same(shared_data: Path) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    text = (shared_data / "text/the-verdict.txt").read_bytes().decode()
    found = collect_imatrix(
        shared_data / "stories260K/stories260K-F32.gguf", text, n_ctx=256, chunks=golden["chunk_count"]
    )
    assert (found.chunk_count, found.chunk_size) == (golden["chunk_count"], golden["chunk_size"])
    assert set(found.sums) == set(golden["sums"])
    for name, sums in golden["sums"].items():
        np.testing.assert_allclose(found.sums[name], sums, rtol=0.01)
        assert found.counts[name] == golden["counts"][name]


def test_one_window_is_needed(tmp_path: Path) -> None:
    model = azquant.load(tiny_model(tmp_path, "gpt2"))
    with pytest.raises(ArgumentError, match="the text has 5 tokens"):
        collect_imatrix(model, "abcde")


# ---- the file


def test_the_file_as_gguf_reads_it(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", example())
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == ["text.txt"]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (3, 256)
    tensors = {t.name: (t.tensor_type.name, t.shape.tolist(), t.data.tolist()) for t in reader.tensors}
    assert tensors == {
        "a.weight.counts": ("F32", [1, 2], [[2.0], [0.0]]),
        "a.weight.in_sum2": ("F32", [2, 2], [[2.0, 6.0], [0.0, 0.0]]),
        "blk.0.ffn_up.weight.counts": ("F32", [1], [2.0]),
        "blk.0.ffn_up.weight.in_sum2": ("F32", [3], [1.0, 4.0, 0.0]),
    }


def test_round_trip(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", example())
    back = read_imatrix(tmp_path / "i.gguf")
    assert (back.datasets, back.chunk_count, back.chunk_size) == (("text.txt",), 3, 256)
    for name, sums in example().sums.items():
        np.testing.assert_array_equal(back.sums[name], sums)
        np.testing.assert_array_equal(back.counts[name], example().counts[name])
    np.testing.assert_array_equal(back.importance("blk.0.ffn_up.weight"), [0.5, 2, 0])
    np.testing.assert_array_equal(back.importance("a.weight"), [[1, 3], [1, 1]])
    assert back.importance("b") is None


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    (tmp_path / "i.gguf").write_bytes(b"mine")
    with pytest.raises(OutputError):
        write_imatrix(tmp_path / "i.gguf", example())
    assert (tmp_path / "i.gguf").read_bytes() == b"mine"
    write_imatrix(tmp_path / "i.gguf", example(), overwrite=True)


def _file(path: Path, tensors: dict[str, Any], kind: str = "imatrix") -> Path:
    arrays = {name: np.asarray(value, dtype=np.float32) for name, value in tensors.items()}
    specs = [TensorSpec(name, array.shape, get_type("f32")) for name, array in arrays.items()]
    write_gguf(path, {keys.TYPE: keys.string(kind)}, specs, lambda spec: [arrays[spec.name]])
    return path


@pytest.mark.parametrize(
    ("tensors", "kind", "message"),
    [
        ({}, "model", "no importance matrix"),
        ({"a.in_sum2": [1, 2]}, "imatrix", r"a\.counts is missing"),
        ({"a.in_sum2": [[1, 2], [3, 4]], "a.counts": [1]}, "imatrix", "counts do not fit"),
        ({"a.in_sum2": [1, 2], "a.counts": [1, 2]}, "imatrix", "counts do not fit"),
        ({"a.in_sum2": [np.nan], "a.counts": [1]}, "imatrix", "NaN"),
        ({"a.in_sum2": [-1], "a.counts": [1]}, "imatrix", "negative"),
        ({"a.in_sum2": [1], "a.counts": [np.inf]}, "imatrix", "infinity"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, tensors: Any, kind: str, message: str) -> None:
    with pytest.raises(GGUFError, match=message):
        read_imatrix(_file(tmp_path / "bad.gguf", tensors, kind))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputFileError):
        read_imatrix(tmp_path / "none.gguf")
    (tmp_path / "old.dat").write_bytes(b"\x02\0\0\0")
    with pytest.raises(GGUFError):
        read_imatrix(tmp_path / "old.dat")
