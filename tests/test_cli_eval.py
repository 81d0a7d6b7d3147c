"""``azquant eval`` and ``azquant imatrix``: what they print and write, and how they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from engine_support import tiny_model

from azquant.errors import ArgumentError, AzquantError, InputFileError, OutputError
from azquant.evaluate import collect_imatrix, evaluate
from azquant.imatrix import read_imatrix

pytest.importorskip("azquant.cli.console", reason="the command line is not there")

from azquant.cli.eval import evaluate as eval_verb
from azquant.cli.imatrix import imatrix as imatrix_verb

TEXT = "Azərbaycan Respublikası Cənubi Qafqazda yerləşir. " * 4


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("m"), "gpt2", "q8_0", n_positions=64)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    return tmp_path / "text.txt"


def run(
    verb: Any, *arguments: Any, error: type[AzquantError] | None = None, text: str | None = None
) -> Result:
    result = CliRunner().invoke(verb, [str(a) for a in arguments], input=text)
    assert type(result.exception) is (error or type(None)), result.exception
    return result


def test_eval(path: Path, text: Path) -> None:
    expected, divergence = evaluate(path, TEXT, base=path)
    assert divergence is not None
    printed = run(eval_verb, path, text, "--base", path).output
    for part in (f"{expected.perplexity:.4f}", "3 of 64 tokens", "0.000000", "100.00%"):
        assert part in printed
    report = json.loads(run(eval_verb, path, text, "--base", path, "--json").output)
    assert report["divergence"] == {"from": str(path), **divergence.as_dict()}
    assert {name: report[name] for name in expected.as_dict()} == expected.as_dict()


def test_eval_options(path: Path, text: Path, tmp_path: Path) -> None:
    report = json.loads(run(eval_verb, path, text, "--n-ctx", 32, "--chunks", 2, "--json").output)
    assert (report["n_ctx"], report["chunks"]) == (32, 2)
    assert "divergence" not in report
    standard_input = json.loads(run(eval_verb, path, "-", "--json", text=TEXT).output)
    assert standard_input["chunks"] == 3
    pytest.importorskip("matplotlib")
    run(eval_verb, path, text, "--plot", tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size > 1000


def test_imatrix(path: Path, text: Path, tmp_path: Path) -> None:
    expected = collect_imatrix(path, TEXT)
    target = tmp_path / "i.gguf"
    assert "8 matrices, 192 tokens in 3 windows" in run(imatrix_verb, path, text, target).output
    found = read_imatrix(target)
    assert found.datasets == (str(text),)
    for name, sums in expected.sums.items():
        np.testing.assert_allclose(found.sums[name], sums, rtol=1e-6)
    run(imatrix_verb, path, text, target, error=OutputError)
    report = json.loads(run(imatrix_verb, path, text, target, "--overwrite", "--json").output)
    assert report["matrices"]["blk.0.ffn_down.weight"] == {"columns": 160, "rows": 192}


def test_refusals(path: Path, text: Path, tmp_path: Path) -> None:
    run(eval_verb, path, tmp_path / "none.txt", error=InputFileError)
    run(eval_verb, tmp_path / "none.gguf", text, error=InputFileError)
    run(eval_verb, path, text, "--threads", 0, error=ArgumentError)
    (tmp_path / "latin1.txt").write_bytes("şəhər".encode("utf-16"))
    run(eval_verb, path, tmp_path / "latin1.txt", error=ArgumentError)
    run(imatrix_verb, path, text, text, "--overwrite", error=OutputError)
    assert text.read_bytes() == TEXT.encode()
    run(imatrix_verb, path, text, path, "--overwrite", error=OutputError)
