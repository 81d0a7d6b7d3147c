"""Chats, penalties and cache types on the command line: what the library gives, one line where it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from engine_support import tiny_model

import azquant
from azquant.cli import cli

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("chat"), "gpt2", template=TEMPLATE, n_positions=128)


def run(*args: str | Path, **kwargs: Any) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], **kwargs)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_generate_puts_the_template_around_the_prompt(path: Path) -> None:
    with azquant.load(path) as model:
        plain = model.chat([user("salam")], max_tokens=8)
        told = model.chat([{"role": "system", "content": "qısa"}, user("salam")], max_tokens=8)
        tokens = model.chat_tokens([user("salam")])
    assert run("generate", path, "salam", "--chat", "--max-tokens", "8").stdout == plain + "\n"
    flags = ("--chat", "--system", "qısa", "--max-tokens", "8")
    assert run("generate", path, "salam", *flags).stdout == told + "\n"
    report = json.loads(run("generate", path, "salam", "--chat", "--max-tokens", "8", "--json").stdout)
    assert report["prompt_tokens"] == tokens
    assert report["text"] == plain


@pytest.mark.parametrize("flag", ["--frequency-penalty", "--presence-penalty"])
def test_penalties_reach_the_sampler(path: Path, flag: str) -> None:
    name = flag.removeprefix("--").replace("-", "_")
    with azquant.load(path) as model:
        wanted = model.generate("a", max_tokens=20, **{name: 1.5})  # type: ignore[arg-type]
        assert wanted != model.generate("a", max_tokens=20)
    assert run("generate", path, "a", "--max-tokens", "20", flag, "1.5").stdout == wanted + "\n"


@pytest.mark.parametrize(
    "args",
    [
        ("--chat", "--ids"),
        ("--system", "x"),
        ("--frequency-penalty", "nan"),
        ("--kv-type", "q4_0"),
        ("--n-ctx", "0"),
    ],
    ids=" ".join,
)
def test_wrong_options_are_refused(path: Path, args: tuple[str, ...]) -> None:
    result = run("generate", path, "a", *args)
    assert result.exit_code == 2
    assert not result.stdout


def test_generate_takes_a_q8_0_cache(path: Path) -> None:
    with azquant.load(path, kv_type="q8_0", n_ctx=40) as model:
        wanted = model.generate("Bakı", max_tokens=12)
    flags = ("--kv-type", "q8_0", "--n-ctx", "40", "--stats")
    result = run("generate", path, "Bakı", "--max-tokens", "12", *flags)
    assert result.stdout == wanted + "\n"
    assert "memory: weights" in result.stderr


def test_a_chat_remembers_and_clears(path: Path) -> None:
    with azquant.load(path) as model:
        first = model.chat([user("a")], max_tokens=4)
        talk = [user("a"), {"role": "assistant", "content": first}, user("b")]
        second = model.chat(talk, max_tokens=4)
        third = model.chat([user("b")], max_tokens=4)
    assert second != third
    typed = "a\n\nb\n/clear\nb\n/bye\nc\n"
    result = run("chat", path, "--max-tokens", "4", input=typed)
    assert result.exit_code == 0
    assert result.stdout == f"{first}\n{second}\n{third}\n"


def test_a_chat_needs_a_template(tmp_path: Path) -> None:
    result = run("chat", tiny_model(tmp_path, "gpt2"), input="a\n")
    assert result.exit_code == 2
    assert "chat template" in result.stderr


def test_a_chat_that_outgrows_the_context_says_so(path: Path) -> None:
    result = run("chat", path, "--n-ctx", "12", input="a long message\n")
    assert result.exit_code == 2
    assert "12 positions" in result.stderr


def test_bench_states_the_memory(path: Path) -> None:
    flags = ("--prompt-tokens", "4", "--answer-tokens", "2", "--batch", "1", "--repeats", "1", "--quiet")
    found = json.loads(run("bench", path, *flags, "--kv-type", "q8_0", "--json").stdout)
    with azquant.load(path, kv_type="q8_0") as model:
        assert found["runs"][0]["memory"]["weights"] == model.memory.weights
        assert found["runs"][0]["memory"]["cache_per_sequence"] == model.memory.cache_per_sequence
    assert "memory stated" in run("bench", path, *flags).stdout
