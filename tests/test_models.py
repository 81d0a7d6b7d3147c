"""Every architecture against transformers and llama.cpp: what converts also runs, and says the same."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_support import llama_cpp, read_metadata, read_tensors
from tiny_models import MODELS, VOCAB_SIZE, build, byte_tokenizer, logits, save, tokens

import azquant
from azquant import _backend

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:sliding_window is:azquant.errors.ConversionWarning")

UPSTREAM = json.loads((Path(__file__).parent / "golden" / "llama_cpp_names.json").read_text(encoding="utf-8"))

Case = tuple[str, Any, Path]


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """(name, transformers model, its file in F32)"""
    folder = tmp_path_factory.mktemp("model")
    model = build(request.param)
    save(model, folder / "hf")
    azquant.convert(folder / "hf", folder / "model.gguf", "f32")
    return request.param, model, folder / "model.gguf"


@pytest.fixture(params=["_native", "_fallback"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The C executor, then the NumPy one."""
    module = importlib.import_module(f"azquant.{request.param}")
    monkeypatch.setattr(_backend, "_choose", lambda: (module, None))
    _backend.kernels.cache_clear()
    yield
    _backend.kernels.cache_clear()


@pytest.mark.usefixtures("backend")
def test_logits_are_those_of_transformers(case: Case) -> None:
    _, model, path = case
    ids = tokens(60)
    expected = logits(model, ids)
    found = azquant.load(path, compute="fp32", kv_type="f32").logits(ids)
    assert expected.max() - expected.min() > 3  # else nothing is being told apart
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_llama_cpp_agrees(case: Case) -> None:
    name, model, path = case
    ids = tokens(MODELS[name][1] or 60)
    expected = logits(model, ids)[-1]
    expected = expected - expected.max()
    expected -= np.log(np.exp(expected).sum())
    # The bias makes it choose "A", since half a character is not answered; probabilities come without it.
    bias = [[byte_tokenizer().token_to_id("A"), 1000.0]]
    request = {"prompt": ids, "n_predict": 1, "n_probs": VOCAB_SIZE, "logit_bias": bias}
    (answer,) = llama_cpp(path, request, n_ctx=256)  # longrope: the original context, so the short divisors
    top = answer["completion_probabilities"][0]["top_logprobs"]
    found = {entry["id"]: entry["logprob"] for entry in top}
    assert len(found) == VOCAB_SIZE
    assert np.abs(expected - [found[i] for i in range(VOCAB_SIZE)]).max() < 0.01


# What azquant writes and llama.cpp's converter does not, or otherwise, and why.
MORE_KEYS = {
    "vocab_size",  # so that a file without a tokenizer can be run
    "attention.key_length",  # llama.cpp's default, said
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",  # llama.cpp's converter forgets it for gptneox, falcon, gemma2
    "attention.head_count_kv",
    "attention.sliding_window",  # honoured by azquant where llama.cpp has none
    "attention.sliding_window_pattern",  # layer_types, which llama.cpp's converter ignores
    "hidden_activation",  # the exact GELU, which llama.cpp approximates
    "rope.scaling.type",  # gptneox, falcon, gemma2, phi3: ignored by llama.cpp's converter
    "rope.scaling.factor",
    "context_length",  # falcon, where these two are constants of llama.cpp's converter
    "feed_forward_length",
}


def test_names_and_bytes_are_those_of_llama_cpps_converter(case: Case) -> None:
    name, _, path = case
    upstream = UPSTREAM[name]
    if "refused" in upstream:
        pytest.skip(f"llama.cpp's converter: {upstream['refused']}")
    found = read_tensors(path)
    for tensor in (
        found.keys() - upstream["tensors"].keys()
    ):  # without these, llama.cpp does not load the model
        if tensor == "output.weight":
            assert name in ("gptneox serial", "olmo2 tied")
            assert found[tensor][2] == found["token_embd.weight"][2]
        else:
            assert name in ("gptneox serial", "starcoder2 bare") and tensor.endswith(".bias")
            assert not any(found[tensor][2])
    for tensor, (shape, digest) in upstream["tensors"].items():
        assert list(found[tensor][0]) == shape, tensor
        if digest is not None:  # None where it is known to be wrong
            assert hashlib.sha256(found[tensor][2]).hexdigest() == digest, tensor
    metadata = read_metadata(path)
    assert metadata["general.architecture"][1] == upstream["architecture"]
    own = {key: value[1] for key, value in metadata.items() if key.startswith(f"{upstream['architecture']}.")}
    for key, value in upstream["metadata"].items():
        if key in ("falcon.context_length", "falcon.feed_forward_length"):  # constants there
            continue
        assert own.pop(key) == (pytest.approx(value) if isinstance(value, float) else value), key
    assert {key.split(".", 1)[1] for key in own} <= MORE_KEYS
