"""What the README shows works: its Python runs, its commands and options exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from conftest import ROOT

import azquant
from azquant.cli import cli

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def run_block(number: int, folder: Path) -> str:
    """Runs one of the README's Python blocks in a folder that has the examples; returns what it prints."""
    if not (ROOT / "examples" / "az_llm_tiny").is_dir():
        pytest.skip("examples/az_llm_tiny is not here")
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    (folder / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", blocks[number]], cwd=folder, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_the_python_runs(tmp_path: Path) -> None:
    assert "bits per weight" in run_block(0, tmp_path)
    assert (tmp_path / "tiny-q4_0.gguf").stat().st_size < 5_000_000


def test_the_pytorch_runs(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    assert "18 of 19 layers quantized" in run_block(1, tmp_path)
    azquant.convert(ROOT / "examples" / "az_llm_tiny", tmp_path / "converted.gguf", "q4_0")
    assert (tmp_path / "torch-q4_0.gguf").read_bytes() == (tmp_path / "converted.gguf").read_bytes()


def test_the_verbs_and_options_exist() -> None:
    used = re.findall(rf"azquant ({'|'.join(cli.commands)})\b([^`\n|#]*)", README)
    assert len(used) > 8
    for verb, rest in used:
        command = cli.commands[verb]
        if isinstance(command, click.Group):
            command = command.commands[rest.split()[0]]
        options = {
            name
            for p in command.params
            if isinstance(p, click.Option)
            for name in (*p.opts, *p.secondary_opts)
        }
        assert set(re.findall(r"--[a-z-]+", rest)) - options - {"--help"} == set()
    assert set(cli.commands) == {verb for verb, _ in used}


def test_the_make_targets_exist() -> None:
    targets = set(re.findall(r"(?:^|`)make ([a-z][a-z0-9-]*)", README, re.MULTILINE))
    assert {"demo", "test"} <= targets
    assert targets - set(re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.MULTILINE)) == set()


def test_the_api_exists() -> None:
    table = README.partition("## Python API")[2].partition("##")[0]
    names = re.findall(r"`([a-z_]+)\(", table)
    assert {"convert", "load", "quantize", "matmul", "open_gguf"} <= set(names)
    assert [name for name in names if not hasattr(azquant, name) and name != "dequantize"] == []


def test_the_files_it_names_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
