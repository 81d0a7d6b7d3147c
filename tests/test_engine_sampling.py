"""Sampling, judged by transformers' logits processors and by counting draws."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from azquant.engine import GenerateOptions, Options, Sampler
from azquant.engine.sampling import Chooser, _largest, _nucleus, log_softmax
from azquant.engine.stopping import StopFinder
from azquant.errors import ArgumentError, ModelError

VOCAB = 40


def logits(seed: int = 0, n: int = VOCAB) -> Any:
    return (3 * np.random.default_rng(seed).standard_normal(n)).astype(np.float32)


def shares(sampler: Sampler, x: Any, prompt: tuple[int, ...] = (), draws: int = 6000) -> Any:
    """How often each token is drawn."""
    counts = np.zeros(len(x))
    random = sampler.chooser(len(x), prompt)._random
    for _ in range(draws):
        chooser = sampler.chooser(len(x), prompt)
        chooser._random = random
        counts[chooser.choose(x)] += 1
    return counts / draws


def expected(processors: list[Any], x: Any, prompt: tuple[int, ...] = ()) -> Any:
    """transformers' distribution."""
    ids = torch.tensor([prompt], dtype=torch.long)
    scores = LogitsProcessorList(processors)(ids, torch.tensor(x[None], dtype=torch.float64))
    return torch.softmax(scores, dim=-1)[0].numpy()


CASES: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "plain": ({"temperature": 1.0}, []),
    "temperature": ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
    "top_k": ({"temperature": 1.0, "top_k": 5}, [TopKLogitsWarper(5)]),
    "top_p": ({"temperature": 1.0, "top_p": 0.7}, [TopPLogitsWarper(0.7)]),
    "min_p": ({"temperature": 1.0, "min_p": 0.1}, [MinPLogitsWarper(0.1)]),
    "repetition": (
        {"temperature": 1.0, "repetition_penalty": 1.7},
        [RepetitionPenaltyLogitsProcessor(1.7)],
    ),
    "all": (
        {
            "temperature": 1.4,
            "top_k": 20,
            "top_p": 0.85,
            "min_p": 0.05,
            "repetition_penalty": 1.3,
        },
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(1.4),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.85),
            MinPLogitsWarper(0.05),
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_transformers(case: str) -> None:
    options, processors = CASES[case]
    prompt = (3, 4, 9, 9)
    x = logits()
    wanted, found = expected(processors, x, prompt), shares(Sampler(seed=1, **options), x, prompt)
    assert (found[wanted == 0] == 0).all()
    np.testing.assert_allclose(found, wanted, atol=5 * math.sqrt(0.25 / 6000))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    top_k=st.integers(1, VOCAB + 3),
    top_p=st.floats(0.01, 0.999),
    min_p=st.floats(0, 1),
    temperature=st.floats(0.05, 20),
)
def test_same_tokens_stay_as_in_transformers(
    seed: int, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    x = logits(seed)
    processors = [
        TemperatureLogitsWarper(temperature),
        TopKLogitsWarper(top_k),
        TopPLogitsWarper(top_p),
        MinPLogitsWarper(min_p),
    ]
    allowed = expected(processors, x) > 0
    sampler = Sampler(temperature, top_k, top_p, seed, min_p)
    chooser = sampler.chooser(VOCAB)
    for _ in range(50):
        assert allowed[chooser.choose(x)]


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert Sampler().chooser(4).choose(np.array([1, 2, 2, 0], dtype=np.float32)) == 1


def test_top_k_takes_the_lowest_of_equals() -> None:
    x = np.array([0, 1, 1, 1, 5], dtype=np.float32)
    assert set(np.flatnonzero(shares(Sampler(1.0, top_k=3, seed=0), x, draws=2000))) == {1, 2, 4}


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e300])
def test_extreme_temperatures(temperature: float) -> None:
    token = Sampler(temperature, seed=0).chooser(VOCAB).choose(logits())
    assert 0 <= token < VOCAB
    assert temperature > 1 or token == int(np.argmax(logits()))


def test_frequency_and_presence_penalties() -> None:
    x = np.array([2.0, 1.0, 0.0], dtype=np.float32)
    chooser = Sampler(frequency_penalty=0.4, presence_penalty=0.2).chooser(3, prompt=[0, 0, 0])
    # 2 -> 1.4 -> 1.0 (equal to token 1, lower id) -> 0.6; the prompt does not count
    assert [chooser.choose(x) for _ in range(4)] == [0, 0, 0, 1]


def test_repetition_penalty_counts_the_prompt_and_the_answer() -> None:
    x = np.array([2.0, 1.5, 1.2], dtype=np.float32)
    chooser = Sampler(repetition_penalty=2).chooser(3, prompt=[0])
    assert [chooser.choose(x) for _ in range(3)] == [1, 2, 0]


def test_logit_bias() -> None:
    x = logits()
    best = int(np.argmax(x))
    assert Sampler(logit_bias={best: -math.inf}).chooser(VOCAB).choose(x) != best
    assert Sampler(logit_bias={7: 1000.0}).chooser(VOCAB).choose(x) == 7
    assert x[best] == logits()[best]  # what was given is not changed


def test_bias_comes_before_penalties() -> None:
    x = np.array([1.0, 4.0], dtype=np.float32)
    chooser = Sampler(logit_bias={0: 5.0}, repetition_penalty=2.0).chooser(2, prompt=[0])
    assert chooser.choose(x) == 1  # (1 + 5) / 2 = 3 < 4; the other order would give 5.5


def test_everything_forbidden() -> None:
    with pytest.raises(ArgumentError, match="forbids every"):
        Sampler(logit_bias={0: -math.inf, 1: -math.inf}).chooser(2).choose(np.zeros(2, np.float32))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(bad: float, temperature: float) -> None:
    x = logits()
    x[5] = bad
    with pytest.raises(ModelError, match="not finite"):
        Sampler(temperature).chooser(VOCAB).choose(x)


def test_seeds() -> None:
    def draw(seed: int | None) -> list[int]:
        chooser = Sampler(1.5, seed=seed).chooser(VOCAB)
        return [chooser.choose(logits(i)) for i in range(30)]

    assert draw(1) == draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_log_softmax() -> None:
    x = np.stack([logits(i) for i in range(5)])
    np.testing.assert_allclose(log_softmax(x), torch.log_softmax(torch.tensor(x, dtype=torch.float64), -1))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": -1},
        {"temperature": "1"},
        {"temperature": True},
        {"temperature": None},
        {"temperature": 10**400},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_k": True},
        {"top_p": 0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 2},
        {"min_p": math.nan},
        {"seed": -1},
        {"seed": 1.0},
        {"seed": 1 << 200},
        {"repetition_penalty": 0},
        {"repetition_penalty": -1},
        {"repetition_penalty": math.nan},
        {"frequency_penalty": math.inf},
        {"presence_penalty": math.nan},
        {"logit_bias": [1, 2]},
        {"logit_bias": {"a": 1}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {1: math.inf}},
        {"max_tokens": -1},
        {"max_tokens": 1.0},
        {"max_tokens": None},
        {"stop": ""},
        {"stop": [""]},
        {"stop": [1]},
        {"stop": b"x"},
        {"stop": 5},
        {"stop": ["a"] * 65},
        {"stop": "a\ud800"},
        {"stop_tokens": "ab"},
        {"stop_tokens": 5},
        {"stop_tokens": [-1]},
        {"stop_tokens": [1.5]},
        {"logprobs": -1},
        {"logprobs": 10**6},
        {"logprobs": True},
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        Options(**options)


def test_numpy_numbers_are_numbers() -> None:
    Options(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint8(1))  # type: ignore[arg-type]


def test_bias_outside_the_vocabulary() -> None:
    with pytest.raises(ArgumentError, match="ids end at 39"):
        Chooser(Sampler(logit_bias={40: 1.0}), VOCAB)


def test_the_typed_keywords_are_all_there() -> None:
    assert set(GenerateOptions.__annotations__) == set(Options.__dataclass_fields__)


# ---- stop strings


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 30)),
)
def test_stop_strings_found_wherever_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    finder, given_out, edges = (
        StopFinder(stops),
        "",
        sorted({0, len(text), *[c % (len(text) + 1) for c in cuts]}),
    )
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    for a, b in pairwise(edges):
        given_out += finder.push(text[a:b])
        if finder.found is not None:
            break
    given_out += finder.flush()
    if not ends:
        assert finder.found is None
        assert given_out == text
    else:
        assert finder.found in stops
        assert given_out + finder.found == text[: len(given_out) + len(finder.found)]
        assert not any(stop in given_out for stop in stops)


def test_text_is_given_out_as_soon_as_it_is_certain() -> None:
    finder = StopFinder(["###"])
    assert [finder.push(c) for c in "a#b##"] == ["a", "", "#b", "", ""]
    assert finder.flush() == "##"


# ---- large vocabularies, where not everything is sorted ------------------------------------------------


@given(
    st.integers(0, 99),
    st.sampled_from([65, 320, 4999]),
    st.integers(1, 65),
    st.sampled_from([0.05, 0.5, 4.0]),
)
@settings(deadline=None)
def test_the_largest_of_many(seed: int, n: int, k: int, grain: float) -> None:
    x = np.round(np.random.default_rng(seed).standard_normal(n) / grain) * grain  # with many equal ones
    expected = np.sort(np.lexsort((np.arange(n), -x))[:k])  # largest first, of equals the lowest ids
    assert _largest(x, k).tolist() == expected.tolist()


@pytest.mark.parametrize("spread", [0.1, 1, 6])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.95, 0.999])
def test_the_nucleus_of_many(spread: float, share: float) -> None:
    x = torch.from_numpy(spread * np.random.default_rng(5).standard_normal((1, 5000)))
    theirs = TopPLogitsWarper(share)(None, x)[0]  # type: ignore[arg-type]
    ours = _nucleus(torch.softmax(x, -1)[0].numpy(), share)
    assert sorted(ours.tolist()) == torch.isfinite(theirs).nonzero().flatten().tolist()
