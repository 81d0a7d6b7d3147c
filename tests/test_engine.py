"""The engine against transformers, llama.cpp and llama2.c, and against itself where bits must be equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_support import (
    GPT2_CONFIG,
    LLAMA_CONFIG,
    gpt2_tensors,
    llama_cpp,
    llama_tensors,
    write_checkpoint,
)

import azquant
from azquant import _fallback
from azquant.conversion import convert
from azquant.engine import Model, load
from azquant.errors import ArgumentError, ContextLengthError, ModelError, TokenizerError

pytestmark = pytest.mark.filterwarnings("ignore::azquant.errors.ConversionWarning")


@pytest.fixture(scope="session")
def az_files(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The real Azerbaijani model as F32 and as Q4_0."""
    folder = tmp_path_factory.mktemp("az")
    files = {}
    for kind in ("f32", "q4_0"):
        files[kind] = folder / f"az-{kind}.gguf"
        convert(shared_data / "az_llm_small", files[kind], type=kind)
    return files


@pytest.fixture(scope="session")
def heldout(shared_data: Path, az_files: dict[str, Path]) -> list[int]:
    """Token ids of text that the model never saw."""
    text = (shared_data / "az_llm_small" / "heldout.txt").read_text(encoding="utf-8")
    return load(az_files["f32"]).tokenizer.encode(text)


def small(tmp_path: Path, kind: str, which: str = "gpt2", **options: Any) -> Model:
    """A small random model."""
    if which == "gpt2":
        folder = write_checkpoint(tmp_path / "hf", GPT2_CONFIG, gpt2_tensors(GPT2_CONFIG))
    else:
        folder = write_checkpoint(tmp_path / "hf", LLAMA_CONFIG, llama_tensors(LLAMA_CONFIG))
    convert(folder, tmp_path / f"{which}-{kind}.gguf", type=kind, overwrite=True)
    return load(tmp_path / f"{which}-{kind}.gguf", **options)


# ---- against others ------------------------------------------------------------------------------------


def test_fp32_logits_equal_transformers(
    az_files: dict[str, Path], heldout: list[int], shared_data: Path
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    reference = transformers.GPT2LMHeadModel.from_pretrained(shared_data / "az_llm_small").eval()
    model = load(az_files["f32"], compute="fp32", kv_type="f32")
    for start in range(0, 1024, 256):
        tokens = heldout[start : start + 256]
        with torch.no_grad():
            expected = reference(torch.tensor([tokens])).logits[0].numpy()
        assert np.abs(model.logits(tokens) - expected).max() < 1e-4


def test_log_probabilities_agree_with_llama_cpp(az_files: dict[str, Path], heldout: list[int]) -> None:
    model = load(az_files["f32"], compute="fp32", kv_type="f32")
    prompts = [heldout[start : start + 64] for start in range(0, 1000, 200)]
    requests = [{"prompt": prompt, "n_predict": 1, "n_probs": model.n_vocab} for prompt in prompts]
    for prompt, answer in zip(prompts, llama_cpp(az_files["f32"], *requests), strict=True):
        listed = answer["completion_probabilities"][0]["top_logprobs"]
        theirs = {entry["id"]: entry["logprob"] for entry in listed}
        logits = model.logits(prompt)[-1].astype(np.float64)
        ours = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        assert len(theirs) == model.n_vocab
        assert max(abs(ours[token] - value) for token, value in theirs.items()) < 0.02


def test_int8_is_close_to_fp32_on_the_same_q4_0_file(az_files: dict[str, Path], heldout: list[int]) -> None:
    int8 = load(az_files["q4_0"], compute="int8")
    fp32 = load(az_files["q4_0"], compute="fp32", kv_type="f32")
    difference = norm = agree = total = 0.0
    for start in range(0, len(heldout) - 256, 256):
        a, b = int8.logits(heldout[start : start + 256]), fp32.logits(heldout[start : start + 256])
        difference += float(np.square(a - b, dtype=np.float64).sum())
        norm += float(np.square(b, dtype=np.float64).sum())
        agree += float((a.argmax(axis=1) == b.argmax(axis=1)).sum())
        total += len(a)
    assert (difference / norm) ** 0.5 <= 0.02
    assert agree / total >= 0.97


@pytest.mark.parametrize("backend", ["c", "numpy"])
def test_a_q8_0_cache_changes_predictions_little(
    backend: str, az_files: dict[str, Path], heldout: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "numpy":
        monkeypatch.setattr("azquant.engine.model.kernels", lambda: _fallback)
        monkeypatch.setattr("azquant.engine.session.kernels", lambda: _fallback)
        monkeypatch.setattr("azquant.engine.weights.kernels", lambda: _fallback)
        heldout = heldout[:129]
    exact, rounded = (load(az_files["f32"], compute="fp32", kv_type=kind) for kind in ("f32", "q8_0"))
    difference = norm = 0.0
    losses = np.zeros(2)
    size = 64 if backend == "numpy" else 256
    for start in range(0, len(heldout) - size, size):
        window = heldout[start : start + size]
        both = [model.logits(window).astype(np.float64) for model in (exact, rounded)]
        difference += float(np.square(both[0] - both[1]).sum())
        norm += float(np.square(both[0]).sum())
        for i, logits in enumerate(both):
            top = logits.max(axis=1)
            total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
            losses[i] += float((total[:-1] - logits[np.arange(size - 1), window[1:]]).sum())
    assert 0 < (difference / norm) ** 0.5 <= 0.005
    assert abs(losses[1] / losses[0] - 1) <= 0.001


@pytest.mark.parametrize("source", ["model.safetensors", "pytorch_model.bin", "gguf"])
def test_stories260k_tells_the_golden_story(source: str, shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "stories260K"
    golden = json.loads((folder / "greedy200_tokens.json").read_text())
    path = folder / "stories260K-F32.gguf"
    if source != "gguf":
        checkpoint = tmp_path / "hf"
        checkpoint.mkdir()
        for name in ("config.json", source):
            (checkpoint / name).write_bytes((folder / "hf" / name).read_bytes())
        path = tmp_path / "story.gguf"
        convert(checkpoint, path, type="f32")
    model = load(path)
    assert model.generate([1], max_tokens=200) == golden
    if source == "gguf":
        text = (folder / "expected_stdout_llama2c.txt").read_text(encoding="utf-8")
        assert model.generate("", max_tokens=200) == text
        assert "".join(model.stream("", max_tokens=200)) == text


def test_every_isa_tells_the_golden_story(shared_data: Path, isa: str) -> None:
    folder = shared_data / "stories260K"
    golden = json.loads((folder / "greedy200_tokens.json").read_text())
    assert load(folder / "stories260K-F32.gguf").generate([1], max_tokens=60) == golden[:60]


# ---- equal bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["q4_0", "f16"])
def test_reproducible_logits_do_not_depend_on_how_they_are_computed(
    tmp_path: Path, kind: str, which: str
) -> None:
    model = small(tmp_path, kind, which, reproducible=True)
    tokens = np.arange(7, 7 + 14, dtype=np.int32)
    whole = model.logits(tokens)
    before = azquant.num_threads()
    try:
        for threads in (1, 2, 3, 4):
            azquant.set_num_threads(threads)
            assert np.array_equal(model.logits(tokens), whole)
    finally:
        azquant.set_num_threads(before)
    session = model.session()
    pieces = [session.feed([(0, tokens[at : at + n])], every=True) for at, n in ((0, 5), (5, 1), (6, 8))]
    assert np.array_equal(np.concatenate(pieces), whole)
    batch = model.session(3)
    batch.feed([(1, tokens[3:9]), (2, tokens[:1])])
    assert np.array_equal(batch.feed([(0, tokens), (2, tokens[5:7])])[0], whole[-1])


def test_the_real_shape_gives_equal_tokens_with_and_without_the_cache(tmp_path: Path) -> None:
    config = GPT2_CONFIG | {
        "vocab_size": 32000,
        "n_positions": 256,
        "n_embd": 768,
        "n_inner": None,
        "n_layer": 12,
        "n_head": 12,
    }
    folder = write_checkpoint(tmp_path / "hf", config, gpt2_tensors(config))
    convert(folder, tmp_path / "real.gguf")
    model = load(tmp_path / "real.gguf", reproducible=True)
    prompt = list(range(100, 120))
    cached = model.generate(prompt, max_tokens=12)
    tokens = list(prompt)
    for _ in range(12):
        tokens.append(int(model.logits(tokens)[-1].argmax()))
    assert tokens[len(prompt) :] == cached
    assert len(set(cached)) > 1


def test_a_batch_answers_as_single_prompts_do(az_files: dict[str, Path]) -> None:
    model = load(az_files["q4_0"], reproducible=True)
    prompts = ["Azərbaycan", "Bakı şəhəri", "Model", "Hər kəs azad və bərabər hüquqlu doğulur"]
    assert model.generate(prompts, max_tokens=20) == [model.generate(p, max_tokens=20) for p in prompts]
    ids = [model.tokenizer.encode(p) for p in prompts]
    assert model.generate(ids, max_tokens=20) == [model.generate(i, max_tokens=20) for i in ids]
    assert "".join(model.stream(prompts[3], max_tokens=20)) == model.generate(prompts[3], max_tokens=20)


# ---- behaviour -----------------------------------------------------------------------------------------


def test_generation_ends_where_the_context_is_full(tmp_path: Path) -> None:
    model = small(tmp_path, "q4_0")
    answer = model.generate(list(range(10)), max_tokens=100)
    assert len(answer) == model.context_length - 10 + 1  # the last token needs no position of its own


def test_sampling_is_repeatable_by_seed(tmp_path: Path) -> None:
    model = small(tmp_path, "f32", "llama")
    options: dict[str, Any] = {"temperature": 1.5, "top_k": 50, "top_p": 0.95, "max_tokens": 15}
    first = model.generate([1, 2, 3], seed=7, **options)
    assert model.generate([1, 2, 3], seed=7, **options) == first
    assert model.generate([[1, 2, 3], [4, 5]], seed=7, **options)[0] == first
    assert any(model.generate([1, 2, 3], seed=seed, **options) != first for seed in range(5))


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ([], ArgumentError),
        ([-1], ArgumentError),
        ([96], ArgumentError),
        ([1.5], ArgumentError),
        (list(range(17)), ContextLengthError),
        ("text", TokenizerError),
    ],
)
def test_prompts_that_cannot_be(tmp_path: Path, prompt: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        small(tmp_path, "q8_0").generate(prompt)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"temperature": float("nan")},
        {"temperature": -1},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.01},
        {"seed": -1},
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        small(tmp_path, "q8_0").generate([1], **options)


def test_load_refuses_unknown_ways_of_computing(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="compute"):
        load(tmp_path / "none.gguf", compute="int4")
    with pytest.raises(ArgumentError, match="kv_type"):
        load(tmp_path / "none.gguf", kv_type="q2")


def test_broken_models_are_refused(shared_data: Path) -> None:
    """Well-formed files whose hyperparameters cannot be: our error, quickly, whatever is wrong."""
    for path in sorted((shared_data / "bad-gguf" / "model-level").glob("SEMREJECT_*.gguf")):
        if "context_length" in path.name:
            continue  # a cache is made for the tokens at hand, never for the length that a file claims
        with pytest.raises(ModelError):
            load(path)


def test_a_huge_context_length_costs_nothing(shared_data: Path) -> None:
    folder = shared_data / "bad-gguf" / "model-level"
    path = folder / "SEMREJECT_context_length_u32max_kv_alloc.gguf"
    try:
        model = load(path)
    except ModelError:
        return
    golden = json.loads((shared_data / "stories260K" / "greedy200_tokens.json").read_text())
    assert model.generate([1], max_tokens=5) == golden[:5]
