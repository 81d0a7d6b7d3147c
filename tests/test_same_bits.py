"""Whole models, reproducible=True: the same logits, to the bit, on every ISA of every architecture.

The hashes below were made on x86-64 with the scalar kernels; an aarch64 machine must give them too. They
change with a definition (a kernel's order of sums, a quantizer) and with the example model, and with nothing
else.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import pytest
from conftest import ROOT
from engine_support import tiny_model

import azquant

EXAMPLE = ROOT / "examples" / "az_llm_tiny"

# SHA-256, first 16 digits, of the logits of 40 tokens.
COMMITTED = {
    "gpt2-q4_0": "5779e8b0774943f9",
    "gpt2-q8_0": "cfb81ad55dddae65",
    "llama-q4_0": "a52ceb411125be17",
    "llama-q6_k": "76b0bcb21a8e711b",
}


@pytest.fixture(scope="module", params=COMMITTED)
def model_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The trained example (GPT-2: GELU, positions), and a random llama (RoPE, SwiGLU, shared keys)."""
    architecture, _, type_ = request.param.partition("-")
    folder = tmp_path_factory.mktemp("model")
    if architecture == "llama":
        sizes = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 64}
        return request.param, tiny_model(folder, "llama", type_, **sizes)
    if not EXAMPLE.is_dir():
        pytest.skip("examples/az_llm_tiny is not here")
    path = folder / "model.gguf"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", azquant.errors.ConversionWarning)
        azquant.convert(EXAMPLE, path, type_)
    return request.param, path


def test_logits_are_the_committed_ones(model_file: tuple[str, Path], c_isa: str) -> None:
    name, path = model_file
    model = azquant.load(path, reproducible=True)
    logits = model.logits([(37 * i * i + 11) % 256 for i in range(40)])
    assert hashlib.sha256(logits.tobytes()).hexdigest()[:16] == COMMITTED[name]
