"""``azquant bench``: its rows, its profile, its refusals. How fast anything is, benchmarks say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from engine_support import tiny_model

from azquant.errors import ArgumentError, AzquantError

pytest.importorskip("azquant.cli.console", reason="the command line is not there")

from azquant.cli.bench import bench

FEW = ("--prompt-tokens", 20, "--answer-tokens", 4, "--repeats", 1, "--batch", 1, "--batch", 3, "--quiet")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("m"), "gpt2", "q8_0", n_positions=64)


def run(*arguments: Any, error: type[AzquantError] | None = None) -> Result:
    result = CliRunner().invoke(bench, [str(a) for a in arguments])
    assert type(result.exception) is (error or type(None)), result.exception
    return result


def test_rows(path: Path) -> None:
    printed = run(path, *FEW).output
    assert all(name in printed for name in ("pp20", "tg4", "tg4 x3", "the same request"))
    (report,) = json.loads(run(path, *FEW, "--json").output)["runs"]
    assert [(row["name"], row["tokens"]) for row in report["rows"]] == [
        ("pp20", 20),
        ("tg4", 4),
        ("tg4 x3", 12),
    ]
    assert all(row["tokens_per_second"] > 0 for row in report["rows"])


def test_lengths_end_with_the_context(path: Path) -> None:
    (report,) = json.loads(run(path, *FEW, "--prompt-tokens", 999, "--json").output)["runs"]
    assert report["rows"][0]["name"] == "pp64"


def test_profile(path: Path) -> None:
    printed = run(path, *FEW, "--profile").output
    assert all(name in printed for name in ("pp20", "tg4 x3", "attention", "layer_norm", "between the ops"))
    profiles = json.loads(run(path, *FEW, "--profile", "--json").output)
    assert [found["name"] for found in profiles] == ["pp20", "tg4", "tg4 x3"]
    for found in profiles:
        assert {"embed", "attention", "layer_norm", "select"} < {op["name"] for op in found["ops"]}
        assert 0 < sum(op["seconds"] for op in found["ops"]) <= found["seconds"]


def test_refusals(path: Path) -> None:
    run(path, "--repeats", 0, error=ArgumentError)
    run(path, "--repeats", 0, "--profile", error=ArgumentError)
    run(path, "--profile", "--compare", __file__, error=ArgumentError)
    run(path, *FEW, "--compare", __file__, error=ArgumentError)  # no program
