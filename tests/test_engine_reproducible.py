"""reproducible=True: the same bits however an answer comes about. Otherwise: within the bounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engine_support import recorded_logits, tiny_model

import azquant
from azquant.engine import Model, scheduler

TYPES = (("gpt2", "q4_0"), ("gpt2", "f16"), ("llama", "q8_0"), ("llama", "q4_0"), ("mixtral", "q4_0"))

pytestmark = pytest.mark.usefixtures("_c_only")


@pytest.fixture(scope="module")
def _c_only() -> None:
    if azquant.backend() != "c":
        pytest.skip("NumPy's products depend on the batch")


@pytest.fixture(scope="module", params=TYPES, ids="-".join)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, type_ = request.param
    return tiny_model(
        tmp_path_factory.mktemp("m"), architecture, type_, n_positions=192, max_position_embeddings=192
    )


@pytest.fixture
def model(path: Path) -> Model:
    return azquant.load(path, reproducible=True, n_seq=8)


def prompts(count: int, longest: int = 150) -> list[list[int]]:
    random = np.random.default_rng(7)
    return [random.integers(0, 256, n).tolist() for n in random.integers(1, longest, count)]


def answer_bits(model: Model, prompt: list[int], patch: pytest.MonkeyPatch, n: int = 12) -> list[bytes]:
    with recorded_logits(patch) as rows:
        model.generate(prompt, max_tokens=n)
    return rows[tuple(prompt)]


def test_cached_and_uncached(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompts(1, 100)[0] + [1, 2, 3]
    with recorded_logits(monkeypatch) as rows:
        answer = model.generate(prompt, max_tokens=12, temperature=0)
    whole = model.logits([*prompt, *answer])  # everything anew, in one piece
    for i, row in enumerate(rows[tuple(prompt)]):
        assert row == whole[len(prompt) - 1 + i].tobytes()


def test_reused_prefix(path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompts(1, 100)[0] + [5] * 40
    fresh = answer_bits(azquant.load(path, reproducible=True), prompt, monkeypatch)
    model.generate([*prompt[:30], 9, 9], max_tokens=5)  # leaves 30 of them in a slot
    handle = model.submit(prompt, max_tokens=1)
    assert handle.result().cached_tokens >= 30
    assert answer_bits(model, prompt, monkeypatch) == fresh


def test_batched_and_single(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    many = prompts(20)
    single = {tuple(p): answer_bits(model, p, monkeypatch) for p in many}
    with recorded_logits(monkeypatch) as rows:
        model.generate(many, max_tokens=12)
    assert rows == single


def test_drawn_answers_do_not_depend_on_the_batch(model: Model) -> None:
    many = prompts(10)
    options = {"max_tokens": 10, "temperature": 1.0, "seed": 5, "top_k": 50, "repetition_penalty": 1.1}
    assert model.generate(many, **options) == [model.generate(p, **options) for p in many]


def test_streamed_and_not(model: Model) -> None:
    for prompt in ("salam, dünya", "ə"):
        whole = model.generate(prompt, max_tokens=30, temperature=0.9, seed=3)
        assert "".join(model.stream(prompt, max_tokens=30, temperature=0.9, seed=3)) == whole
        assert model.submit(prompt, max_tokens=30, temperature=0.9, seed=3).result().text == whole


@pytest.mark.parametrize("budget", [1, 7, 31])
def test_chunked_and_whole_prefill(path: Path, monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    prompt = prompts(1, 100)[0] + [7] * 50
    whole = answer_bits(azquant.load(path, reproducible=True), prompt, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "STEP_TOKENS", budget)
        chunked = answer_bits(azquant.load(path, reproducible=True), prompt, patch)
    assert chunked == whole


def test_any_number_of_threads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, before, bits = prompts(1, 100)[0] + [7] * 40, azquant.num_threads(), []
    try:
        for n in (1, 2, 3, 4):
            azquant.set_num_threads(n)
            bits.append(answer_bits(azquant.load(path, reproducible=True), prompt, monkeypatch))
    finally:
        azquant.set_num_threads(before)
    assert all(other == bits[0] for other in bits[1:])


def test_default_mode_stays_close(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = azquant.load(path), prompts(1, 100)[0] + [7] * 60
    exact = azquant.load(path, compute="fp32", kv_type="f32").logits(tokens)
    whole = model.logits(tokens)
    with recorded_logits(monkeypatch) as rows:
        model.generate(tokens, max_tokens=1)
        model.generate(tokens[:-1], max_tokens=1)
        model.generate(tokens, max_tokens=1)  # all but the last token from the cache
    scale = np.linalg.norm(exact[-1])
    for row in rows[tuple(tokens)]:
        logits = np.frombuffer(row, dtype=np.float32)
        assert np.linalg.norm(logits - whole[-1]) <= 0.05 * scale  # AMX: bf16 for many rows, int8 for one
        assert np.linalg.norm(logits - exact[-1]) <= 0.1 * scale  # int8 activations through every layer
