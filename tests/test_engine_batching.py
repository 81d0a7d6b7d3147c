"""Many answers at once: threads, asyncio, cancellation, forks, Ctrl-C, fairness, the cache's slots."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_support import recorded_logits, tiny_model

import azquant
from azquant import _backend
from azquant.engine import Model
from azquant.engine.scheduler import share_out
from azquant.engine.slots import Slots
from azquant.errors import ArgumentError, ContextLengthError, GenerationTimeout, OutOfMemoryError


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("m"), "gpt2", n_positions=128)


@pytest.fixture
def model(path: Path) -> Model:
    return azquant.load(path, reproducible=True, n_seq=6)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Makes every step take 2 ms more, and notes how many tokens of each sequence it computed."""
    noted: list[list[int]] = []
    program = _backend.kernels().Program
    run = program.run

    def slow(
        self: Any, kv: Any, compute: str, arrays: Any, n_tokens: int, n_out: int, **options: Any
    ) -> None:
        noted.append(np.unique(arrays.sequence[:n_tokens], return_counts=True)[1].tolist())
        time.sleep(0.002)
        run(self, kv, compute, arrays, n_tokens, n_out, **options)

    monkeypatch.setattr(program, "run", slow)
    return noted


ENDLESS: dict[str, Any] = {"max_tokens": 120, "logit_bias": {256: -float("inf")}}


def idle(model: Model) -> bool:
    scheduler = model._scheduler
    return scheduler is None or scheduler._worker is None


def wait_until(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


# ---- many at once


def test_eight_threads_of_fifty_calls(model: Model) -> None:
    texts = [f"{word} {i}" for i in range(10) for word in ("salam", "ə", "x" * 40)]
    single = {text: model.generate(text, max_tokens=6) for text in texts}

    def calls(seed: int) -> bool:
        mine = random.Random(seed)
        return all(model.generate(t, max_tokens=6) == single[t] for t in mine.choices(texts, k=50))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(calls, range(8)))
    wait_until(lambda: idle(model))


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_two_hundred_requests_with_cancellations(model: Model) -> None:
    chance = random.Random(1)
    prompts = [[chance.randrange(256) for _ in range(chance.randint(1, 100))] for _ in range(200)]
    lengths = [chance.randint(1, 28) for _ in prompts]
    single = [model.generate(p, max_tokens=n) for p, n in zip(prompts, lengths, strict=True)]

    def round_of_all() -> int:
        whole, handles = 0, []
        for prompt, n in zip(prompts, lengths, strict=True):
            handles.append(model.submit(prompt, max_tokens=n))
            if chance.random() < 0.4:
                chance.choice(handles).cancel()
            if chance.random() < 0.1:
                time.sleep(0.002)
        for handle, answer in zip(handles, single, strict=True):
            result = handle.result(timeout=60)
            assert result.tokens == answer[: len(result.tokens)]
            if result.finish_reason != "cancelled":
                assert result.tokens == answer
                whole += 1
        return whole

    assert 20 < round_of_all() < 200
    gc.collect()
    before = _rss()
    for _ in range(4):
        round_of_all()
    gc.collect()
    assert _rss() - before < 4 << 20
    wait_until(lambda: idle(model))
    assert not any(slot.busy for slot in model._scheduler._slots._slots)  # type: ignore[union-attr]


def test_more_requests_than_slots_keep_their_order(model: Model) -> None:
    handles = [model.submit([i], **{**ENDLESS, "max_tokens": 4}) for i in range(30)]
    assert [h.result().tokens for h in handles] == model.generate(
        [[i] for i in range(30)], **{**ENDLESS, "max_tokens": 4}
    )


def test_short_requests_overtake_a_long_one(model: Model, steps: list[list[int]]) -> None:
    long = model.submit([1], **ENDLESS)
    short = [model.submit([2, i], **{**ENDLESS, "max_tokens": 2}) for i in range(10)]
    for handle in short:
        handle.result()
    assert not long.done
    assert len(long.result().tokens) == 120


def test_share_out() -> None:
    assert share_out([1, 1, 1], 64) == [1, 1, 1]
    assert share_out([500], 256) == [256]
    assert share_out([1000, 1, 10, 1000], 64) == [26, 1, 10, 27]
    assert share_out([9] * 100, 64) == [1] * 100  # nobody is left out, whatever the budget
    assert sum(share_out([1000, 3, 1000], 256)) == 256


def test_a_long_prompt_does_not_hold_up_those_who_write(model: Model, steps: list[list[int]]) -> None:
    writer = model.submit([1], **ENDLESS)
    wait_until(lambda: len(writer.tokens) > 3)
    model.submit([5] * 110, max_tokens=1).result()
    mixed = [counts for counts in steps if len(counts) == 2]
    assert len(mixed) >= 2  # the prompt came in several pieces
    assert all(sum(counts) <= 64 and 1 in counts for counts in mixed)
    writer.cancel()


# ---- one answer


def test_iterating_twice_and_from_two_threads(model: Model) -> None:
    handle = model.submit("salam", **ENDLESS)
    with ThreadPoolExecutor(2) as pool:
        a, b = pool.map("".join, [handle, handle])
    assert a == b == "".join(handle) == handle.result().text


def test_ids_in_ids_out(model: Model) -> None:
    handle = model.submit([5, 6, 7], **ENDLESS)
    assert list(handle) == handle.result().tokens == handle.tokens
    assert 0 < (handle.result().seconds_to_first or 0) < handle.result().seconds
    assert handle.result().text is None


def test_pieces_are_whole_characters(model: Model) -> None:
    bias = {**{i: -float("inf") for i in range(257)}}
    ids = model.tokenizer.encode("əü😀")
    for token in ids:
        bias.pop(token)
    handle = model.submit("x", max_tokens=60, temperature=2.0, seed=1, logit_bias=bias)
    pieces = list(handle)
    assert "".join(pieces) == model.tokenizer.decode(handle.tokens)
    assert len(pieces) < 60


def test_stop_strings(model: Model) -> None:
    whole = model.generate("salam", **ENDLESS)
    stop = whole[5:8]
    cut = whole[: whole.index(stop)]
    assert model.generate("salam", stop=stop, **ENDLESS) == cut
    assert "".join(model.stream("salam", stop=["no such text", stop], **ENDLESS)) == cut
    result = model.submit("salam", stop=[stop], **ENDLESS).result()
    assert (result.finish_reason, result.stop) == ("stop", stop)
    ids = model.tokenizer.encode("salam")
    assert model.submit(ids, stop=[stop], **ENDLESS).result().text == cut


def test_stop_tokens_and_end_tokens(model: Model) -> None:
    tokens = model.generate([1, 2], **ENDLESS)
    result = model.submit([1, 2], stop_tokens=[tokens[3]], **ENDLESS).result()
    assert result.tokens == tokens[: tokens.index(tokens[3])]
    assert (result.finish_reason, result.stop) == ("stop", tokens[3])
    ended = model.submit([1, 2], logit_bias={256: 1e9}).result()
    assert (ended.tokens, ended.finish_reason, ended.stop) == ([], "stop", 256)


def test_logprobs(model: Model) -> None:
    result = model.submit([1, 2], max_tokens=4, logprobs=3, logit_bias={9: 1e6}).result()
    assert result.tokens == [9] * 4
    assert result.logprobs is not None
    rows = model.logits([1, 2, *result.tokens])[1:-1].astype(np.float64)
    for item, row in zip(result.logprobs, rows, strict=True):
        probabilities = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        assert item.token == 9
        assert item.logprob == pytest.approx(np.log(probabilities[9]), abs=1e-5)  # the model's own, unbiased
        assert [token for token, _ in item.top] == np.argsort(-row, kind="stable")[:3].tolist()
        assert item.top[0][1] == pytest.approx(np.log(probabilities.max()), abs=1e-5)
    assert model.submit([1], max_tokens=1).result().logprobs is None
    for call in (model.generate, lambda *a, **k: list(model.stream(*a, **k))):
        with pytest.raises(ArgumentError, match="submit"):
            call("a", logprobs=1)


def test_the_end_of_the_context(model: Model) -> None:
    handle = model.submit([3] * 100, **ENDLESS)
    result = handle.result()
    assert result.finish_reason == "context"
    assert len(result.tokens) == 29  # 28 positions are left, and the last token needs none
    assert len(model.generate([3] * 128, **ENDLESS)) == 1
    with pytest.raises(ContextLengthError, match="129 tokens given"):
        model.generate([3] * 129)


def test_a_smaller_context(path: Path) -> None:
    model = azquant.load(path, n_ctx=20)
    assert model.n_ctx == 20
    assert len(model.generate([1] * 15, **ENDLESS)) == 6
    with pytest.raises(ContextLengthError):
        model.generate([1] * 21)
    assert azquant.load(path, n_ctx=10**9).n_ctx == 128


def test_max_tokens_zero(model: Model) -> None:
    assert model.generate("a", max_tokens=0) == ""
    assert list(model.stream("a", max_tokens=0)) == []
    assert idle(model)


# ---- ends


def test_cancel(model: Model, steps: list[list[int]]) -> None:
    handle = model.submit([1], **ENDLESS)
    wait_until(lambda: len(handle.tokens) > 2)
    handle.cancel()
    result = handle.result(timeout=5)
    assert result.finish_reason == "cancelled"
    assert 2 < len(result.tokens) < 120
    handle.cancel()


def test_a_dropped_handle_is_cancelled(model: Model, steps: list[list[int]]) -> None:
    stream = model.stream("a", **ENDLESS)
    next(stream)
    stream.close()
    handles = [model.submit([i], **ENDLESS) for i in range(20)]
    del handles
    gc.collect()
    start = time.monotonic()
    wait_until(lambda: idle(model))
    assert time.monotonic() - start < 1


def test_timeout(model: Model, steps: list[list[int]]) -> None:
    handle = model.submit([1], **ENDLESS)
    with pytest.raises(GenerationTimeout):
        handle.result(timeout=0)
    for bad in (-1, float("nan"), "1"):
        with pytest.raises(ArgumentError):
            handle.result(timeout=bad)  # type: ignore[arg-type]
    assert len(handle.result(timeout=30).tokens) == 120


def test_close(model: Model, steps: list[list[int]]) -> None:
    with model:
        handle = model.submit([1], **ENDLESS)
        waiting = [model.submit([1], **ENDLESS) for _ in range(20)]
    assert handle.result().finish_reason == "cancelled"
    assert {h.result().finish_reason for h in waiting} == {"cancelled"}
    with pytest.raises(ArgumentError, match="closed"):
        model.generate("a")
    model.close()


def test_no_thread_is_left(model: Model) -> None:
    model.generate("a", max_tokens=2)
    wait_until(lambda: idle(model))
    assert not [t for t in threading.enumerate() if t.name == "azquant-scheduler"]


def test_an_error_in_a_step_reaches_everybody_and_ends_nothing_else(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = model.generate([4, 5], max_tokens=5)
    with monkeypatch.context() as patch:

        def fail(*_: Any, **__: Any) -> None:
            raise OutOfMemoryError("a step of 3 tokens")

        patch.setattr(type(model._program), "run", fail)
        handles = [model.submit([i], **ENDLESS) for i in range(10)]
        for handle in handles:
            with pytest.raises(OutOfMemoryError):
                handle.result(timeout=10)
            with pytest.raises(OutOfMemoryError):
                list(handle)
    wait_until(lambda: idle(model))
    assert model.generate([4, 5], max_tokens=5) == good


def test_an_error_of_one_answer_leaves_the_others_alone(model: Model, steps: list[list[int]]) -> None:
    everything = {i: -float("inf") for i in range(257)}
    bad, good = model.submit([1], logit_bias=everything), model.submit([1], **ENDLESS)
    with pytest.raises(ArgumentError, match="forbids every"):
        bad.result()
    assert len(good.result().tokens) == 120


# ---- asyncio


def test_asyncio(model: Model) -> None:
    texts = [f"{i} salam" for i in range(12)]
    single = model.generate(texts, max_tokens=20)

    async def streamed(text: str) -> str:
        return "".join([piece async for piece in model.submit(text, max_tokens=20)])

    async def awaited(text: str) -> str | None:
        return (await model.submit(text, max_tokens=20)).text

    async def run() -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticker = asyncio.create_task(tick())
        assert await asyncio.gather(*map(streamed, texts)) == single
        assert await asyncio.gather(*map(awaited, texts)) == single
        assert ticks > 10  # the loop was never blocked
        ticker.cancel()

    asyncio.run(run())


def test_cancelling_a_task_cancels_its_answer(model: Model, steps: list[list[int]]) -> None:
    async def run() -> None:
        handle = model.submit([1], **ENDLESS)

        async def read() -> None:
            await handle

        task = asyncio.create_task(read())
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await asyncio.to_thread(handle.result, 5)).finish_reason == "cancelled"

    asyncio.run(run())


def test_a_loop_that_ends_early(model: Model, steps: list[list[int]]) -> None:
    async def run() -> Any:
        handle = model.submit([1], **ENDLESS)
        async for _ in handle:
            break
        return handle

    assert len(asyncio.run(run()).result(timeout=10).tokens) in range(1, 121)


# ---- processes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork_while_answers_are_made(model: Model) -> None:
    good = model.generate([4, 5], max_tokens=10)
    running = [model.submit([i], **ENDLESS) for i in range(100)]
    children = []
    for _ in range(8):  # at different moments of a step
        wait_until(lambda: running[0].tokens)
        children.append(os.fork())
        if children[-1]:
            time.sleep(0.003)
            continue
        status = 1
        try:
            right = (
                model.generate([4, 5], max_tokens=10) == good
                and len(list(model.stream("a", max_tokens=3))) > 0
            )
            try:
                running[-1].result()
            except ArgumentError:
                status = 0 if right else 3
        finally:
            os._exit(status)
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert all(len(handle.result(timeout=30).tokens) == 120 for handle in running)


def run_script(path: Path, script: str, **options: Any) -> subprocess.Popen[str]:
    quiet = "import warnings; warnings.simplefilter('ignore')"  # that NumPy computes, where it does
    code = f"{quiet}\nimport azquant, sys, time\nmodel = azquant.load({str(path)!r})\n" + textwrap.dedent(
        script
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        **options,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
@pytest.mark.parametrize(
    "call",
    [
        "model.generate(['a', 'b'] * 300, **o)",
        "list(model.stream('a', **o))",
        "model.submit('a', **o).result()",
    ],
)
def test_ctrl_c_returns_at_once(tmp_path: Path, call: str) -> None:
    path = tiny_model(tmp_path, "llama", max_position_embeddings=100_000)
    process = run_script(
        path,
        f"""
        o = dict(max_tokens=90_000, logit_bias={{256: -float("inf")}})
        model.generate("a", max_tokens=1)
        print("go", flush=True)
        try:
            {call}
        except KeyboardInterrupt:
            print(time.monotonic(), flush=True)
        """,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "go\n"
        time.sleep(0.3)
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        caught = float(process.stdout.readline())
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
    assert caught - sent < 0.2
    assert (process.returncode, errors) == (0, "")


def test_leaving_python_while_answers_are_made(path: Path) -> None:
    process = run_script(path, "handles = [model.submit([i], max_tokens=100) for i in range(50)]")
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output, errors) == (0, "", "")


# ---- slots


def slots(n: int = 3) -> tuple[Slots, list[tuple[int, int, int]]]:
    copies: list[tuple[int, int, int]] = []
    return Slots(n, 50, lambda *what: copies.append(what)), copies


def ids(*tokens: int) -> Any:
    return np.array(tokens, dtype=np.int32)


def used(pool: Slots, *tokens: int) -> int:
    slot = pool.take(ids(*tokens))
    slot.extend(ids(*tokens)[slot.length :])
    pool.give_back(slot)
    return slot.index


def test_a_conversation_goes_on_in_its_slot() -> None:
    pool, copies = slots()
    first = used(pool, 1, 2, 3, 4)
    used(pool, 9, 9)
    slot = pool.take(ids(1, 2, 3, 4, 5, 6))
    assert (slot.index, slot.length, copies) == (first, 4, [])


def test_the_last_token_is_always_computed() -> None:
    pool, _ = slots()
    used(pool, 1, 2, 3)
    assert pool.take(ids(1, 2, 3)).length == 2


def test_a_short_common_start_is_copied() -> None:
    pool, copies = slots()
    first = used(pool, 1, 2, 3, 4, 5, 6, 7, 8)
    slot = pool.take(ids(1, 2, 9, 9))
    assert slot.index != first
    assert copies == [(first, slot.index, 2)]
    assert pool.take(ids(1, 2, 3, 4, 5, 6, 7, 8, 9)).length == 8  # still whole


def test_a_busy_slot_is_a_source_too() -> None:
    pool, copies = slots()
    busy = pool.take(ids(1, 2, 3, 4))
    busy.extend(ids(1, 2, 3, 4))
    slot = pool.take(ids(1, 2, 3, 7))
    assert (slot.length, copies) == (3, [(busy.index, slot.index, 3)])


def test_the_oldest_slot_is_given_up_first() -> None:
    pool, _ = slots(2)
    old, new = used(pool, 1, 1, 1), used(pool, 2, 2, 2)
    assert used(pool, 3, 3, 3) == old
    assert used(pool, 4, 4, 4) == new


def test_reused_slots_hold_what_they_say(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random prompts with common starts, in a cache of few slots: every logit as if computed anew."""
    if azquant.backend() != "c":
        pytest.skip("NumPy's products depend on the batch")
    chance = random.Random(3)
    stems = [[chance.randrange(256) for _ in range(40)] for _ in range(4)]
    for _ in range(10):
        prompts = [
            chance.choice(stems)[: chance.randint(1, 40)] + [chance.randrange(256) for _ in range(5)]
            for _ in range(chance.randint(1, 9))
        ]
        with recorded_logits(monkeypatch) as rows:
            model.generate(prompts, max_tokens=1)
        for prompt in prompts:
            assert rows[tuple(prompt)][0] == model.logits(prompt)[-1].tobytes()
