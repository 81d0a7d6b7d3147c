"""Whole models of every weight type: the C executor against the NumPy one, for GPT-2 and Llama files."""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from engine_support import tiny_model

import azquant
from azquant import _backend, _fallback
from azquant.gguf import TensorSpec, edited_metadata, open_gguf, write_gguf
from azquant.ops import encode_rows
from azquant.types import TYPES, GGMLType

native = pytest.importorskip("azquant._native", reason="the C extension is not built")

WIDTH = 256  # whole blocks of every type
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": WIDTH, "n_head": 4, "n_inner": WIDTH, "n_positions": 64},
    "llama": {
        "hidden_size": WIDTH,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": WIDTH,
    },
}
RUNNABLE = [name for name, type_ in TYPES.items() if type_.can_dequantize]
IDS = [7 * i * i % 251 for i in range(24)]


@pytest.fixture(scope="module", params=SHAPES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("f32"), request.param, "f32", **SHAPES[request.param])


def random_blocks(type_: GGMLType, count: int, seed: int) -> npt.NDArray[np.uint8]:
    """Blocks of a type that azquant does not quantize to: random bytes that stand for ordinary numbers."""
    random, found, n = np.random.default_rng(seed), [], 0
    while n < 64:
        data = random.integers(0, 256, (4096, type_.block_bytes), dtype=np.uint8)
        with np.errstate(all="ignore"):
            size = np.abs(_fallback.dequantize(type_.id, data.reshape(-1), 4096, type_.block_size)).max(
                axis=1
            )
        found.append(data[(size > 0.02) & (size < 0.2)])  # NaN is neither
        n += len(found[-1])
    blocks = np.concatenate(found)
    return blocks[random.integers(0, len(blocks), count)].reshape(-1)


def with_type(source: Path, target: Path, type_: GGMLType) -> Path:
    """The same model, or one of its shape, with every matrix of ``type_``."""
    with open_gguf(source) as file:
        tensors = file.tensors
        specs = [
            TensorSpec(t.name, t.shape, type_ if len(t.shape) == 2 and "position" not in t.name else t.type)
            for t in tensors.values()
        ]

        def data(spec: TensorSpec) -> list[npt.NDArray[np.uint8]]:
            found = tensors[spec.name]
            if spec.type is found.type:
                return [found.data]
            if not type_.can_quantize:
                blocks = spec.nbytes // type_.block_bytes
                return [random_blocks(type_, blocks, zlib.crc32(spec.name.encode()))]
            return [encode_rows(found.data.view(np.float32).reshape(spec.shape), type_)]

        write_gguf(target, edited_metadata(file, {}), specs, data)
    return target


def logits(path: Path, module: Any, compute: str, patch: pytest.MonkeyPatch) -> npt.NDArray[np.float32]:
    """The logits of IDS by one backend."""
    with patch.context() as inner, warnings.catch_warnings():
        warnings.simplefilter("ignore", azquant.errors.BackendWarning)
        inner.setattr(_backend, "_choose", lambda: (module, None))
        _backend.kernels.cache_clear()
        try:
            with azquant.load(path, compute=compute) as model:
                return model.logits(IDS)
        finally:
            _backend.kernels.cache_clear()


@pytest.mark.parametrize("name", RUNNABLE)
def test_c_and_numpy_agree(source: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = with_type(source, tmp_path / "typed.gguf", TYPES[name])
    for compute, bound in (("fp32", 1e-3), ("auto", 2e-2)):  # the cache is fp16: a last digit may tip
        c, numpy = (logits(path, module, compute, monkeypatch) for module in (native, _fallback))
        assert np.isfinite(numpy).all()
        assert numpy.std() > 0
        assert np.linalg.norm(c - numpy) <= bound * np.linalg.norm(numpy)
