"""azquant inspect: what it shows of a file, and what a hostile file cannot make it show."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from azquant.cli import cli
from azquant.cli.console import for_terminal, show_bytes, show_count, visible
from azquant.gguf import MetadataValue, TensorSpec, ValueType, keys, write_gguf
from azquant.types import get_type

NASTY = "\x1b]0;owned\x07\x1b[2J\r\n[bold red]x[/bold red]\u202e\x9b31m\x7f"


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, ["inspect", *[str(arg) for arg in args]])


def write(path: Path, metadata: dict[str, MetadataValue], tensors: list[TensorSpec] | None = None) -> Path:
    write_gguf(path, metadata, tensors or [], lambda spec: [np.zeros(spec.nbytes, np.uint8)])
    return path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    metadata = {
        keys.ARCHITECTURE: keys.string("gpt2"),
        keys.NAME: keys.string("Az LLM"),
        "gpt2.context_length": keys.u32(256),
        "gpt2.attention.layer_norm_epsilon": keys.f32(1e-5),
        "x.nan": keys.f32(math.nan),
        "x.double": keys.f64(0.1),
        "x.bool": keys.boolean(True),
        "x.long": keys.string("ə" * 1000),
        "x.none": keys.array(ValueType.INT8, []),
        "x.one": keys.array(ValueType.FLOAT32, [0.5]),
        "x.five": keys.array(ValueType.INT32, [1, 2, 3, 4, 5]),
        "x.nested": keys.array(
            ValueType.ARRAY, [keys.array(ValueType.UINT8, [1, 2]), keys.array(ValueType.STRING, ["a"])]
        ),
        keys.TOKENS: keys.array(ValueType.STRING, [f"t{i}" for i in range(1000)]),
    }
    tensors = [
        TensorSpec("token_embd.weight", (1000, 32), get_type("q8_0")),
        TensorSpec("output_norm.weight", (32,), get_type("f32")),
    ]
    return write(tmp_path / "plain.gguf", metadata, tensors)


def cells(result: Result) -> list[list[str]]:
    assert result.exit_code == 0, result.stderr
    return [line.split(maxsplit=2) for line in result.stdout.splitlines()]


def test_summary(plain: Path) -> None:
    result = run(plain, "--no-metadata", "--no-tensors")
    facts = dict(line.split("  ", 1) for line in result.stdout.splitlines() if "  " in line)
    facts = {key: value.strip() for key, value in facts.items()}
    size = plain.stat().st_size
    assert facts["model"] == "Az LLM"
    assert facts["architecture"] == "gpt2"
    assert facts["context length"] == "256"
    assert facts["vocabulary"] == "1000"
    assert facts["parameters"] == "32 k (32,032)"
    assert facts["size"] == f"{show_bytes(size)} ({size:,} bytes)"
    assert facts["bits per weight"] == f"{8 * (1000 * 34 + 32 * 4) / 32032:.2f}"
    assert facts["tensors"] == "1 q8_0 (32 k weights, 34 kB)"
    assert "metadata" not in result.stdout


def test_metadata_table(plain: Path) -> None:
    rows = cells(run(plain, "--no-tensors"))
    assert ["gpt2.attention.layer_norm_epsilon", "float32", "1e-05"] in rows
    assert ["x.nan", "float32", "nan"] in rows
    assert ["x.double", "float64", "0.1"] in rows
    assert ["x.bool", "bool", "True"] in rows
    assert ["x.long", "string", "ə" * 70 + "… (1,000 characters)"] in rows
    assert ["x.none", "int8[]", "[0 int8s]"] in rows
    assert ["x.one", "float32[]", "[1 float32] 0.5"] in rows
    assert ["x.five", "int32[]", "[5 int32s] 1, 2, 3, 4, 5"] in rows
    assert ["x.nested", "array[]", '[2 arrays] [2 uint8s] 1, 2, [1 string] "a"'] in rows
    assert [keys.TOKENS, "string[]", '[1000 strings] "t0", "t1", "t2", "t3", …'] in rows


def test_full_shows_everything(plain: Path) -> None:
    rows = cells(run(plain, "--no-tensors", "--full"))
    assert ["x.long", "string", "ə" * 1000] in rows
    assert '"t999"' in next(row[2] for row in rows if row and row[0] == keys.TOKENS)


def test_tensor_table(plain: Path) -> None:
    rows = [" ".join(line.split()) for line in run(plain, "--no-metadata").stdout.splitlines()]
    offset = json.loads(run(plain, "--json").stdout)["data_offset"]
    assert f"token_embd.weight 1000 x 32 q8_0 34,000 {offset:,}" in rows
    assert f"output_norm.weight 32 f32 128 {offset + 34016:,}" in rows


def test_json(plain: Path) -> None:
    result = json.loads(run(plain, "--json").stdout)
    assert result["bytes"] == plain.stat().st_size
    assert result["name"] == "Az LLM"
    assert result["context_length"] == 256
    assert result["vocabulary"] == 1000
    assert result["types"]["q8_0"] == {"tensors": 1, "parameters": 32000, "bytes": 34000}
    assert [tensor["name"] for tensor in result["tensors"]] == ["token_embd.weight", "output_norm.weight"]
    assert result["tensors"][0]["shape"] == [1000, 32]
    metadata = result["metadata"]
    assert metadata["x.nan"] == {"type": "float32", "value": "NaN"}
    assert metadata["x.long"]["value"] == "ə" * 1000
    assert metadata[keys.TOKENS]["count"] == 1000
    assert metadata[keys.TOKENS]["complete"] is False
    assert metadata["x.five"]["value"] == [1, 2, 3, 4, 5]
    assert metadata["x.nested"]["value"][1]["value"] == ["a"]


def test_json_full_and_cut(plain: Path) -> None:
    full = json.loads(run(plain, "--json", "--full").stdout)["metadata"][keys.TOKENS]
    assert full["value"] == [f"t{i}" for i in range(1000)]
    assert full["complete"] is True
    cut = json.loads(run(plain, "--json", "--no-metadata", "--no-tensors").stdout)
    assert "metadata" not in cut
    assert "tensors" not in cut


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    folder = tmp_path / "evil\x1b[31m"
    folder.mkdir()
    metadata = {
        keys.ARCHITECTURE: keys.string(NASTY),
        keys.NAME: keys.string(NASTY),
        "key" + NASTY: keys.string(NASTY),
        "x.broken": keys.string("a\udcff\udcfe"),
        keys.TOKENS: keys.array(ValueType.STRING, [NASTY, "\udc80"]),
    }
    return write(folder / "evil.gguf", metadata, [TensorSpec("t\x1b[2J[red]", (1,), get_type("f32"))])


@pytest.mark.parametrize("flags", [[], ["--full"], ["--json"], ["--json", "--full"]])
def test_nothing_of_a_hostile_file_reaches_the_terminal(hostile: Path, flags: list[str]) -> None:
    result = run(hostile, *flags)
    assert result.exit_code == 0, result.stderr
    assert all(char.isprintable() or char == "\n" for char in result.stdout)
    assert "[bold red]" in result.stdout  # text, not markup
    if "--json" in flags:
        read = json.loads(result.stdout)
        assert read["name"] == NASTY  # and a program still gets exactly what is there
        assert read["metadata"]["x.broken"]["value"] == "a\udcff\udcfe"
        assert read["tensors"][0]["name"] == "t\x1b[2J[red]"
    else:
        assert "\\x1b[2J" in result.stdout
        assert "a\\udcff\\udcfe" in result.stdout


def test_an_error_about_a_hostile_name_is_one_clean_line(tmp_path: Path) -> None:
    result = run(tmp_path / "no\x1b[2J\nsuch")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "\x1b" not in result.stderr
    assert "no\\x1b[2J\\nsuch" in result.stderr


@pytest.mark.parametrize("value", [keys.u32(7), keys.array(ValueType.STRING, ["gpt2"]), keys.f32(math.inf)])
def test_an_architecture_that_is_no_text(tmp_path: Path, value: MetadataValue) -> None:
    path = write(tmp_path / "odd.gguf", {keys.ARCHITECTURE: value, keys.TOKENS: keys.u8(1)})
    assert run(path).exit_code == 0
    json.loads(run(path, "--json").stdout)


def test_a_file_with_nothing_in_it(tmp_path: Path) -> None:
    result = run(write(tmp_path / "empty.gguf", {}))
    assert result.exit_code == 0
    assert "metadata (0 keys)" in result.stdout
    assert json.loads(run(tmp_path / "empty.gguf", "--json").stdout)["bits_per_weight"] is None


def test_very_many_keys_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("azquant.cli.inspect._ROWS", 10)
    path = write(tmp_path / "many.gguf", {f"k{i:02}": keys.u8(i) for i in range(25)})
    assert "… and 15 more; --full shows them all" in run(path).stdout
    assert "k24" not in run(path).stdout
    assert "k24" in run(path, "--full").stdout


@pytest.mark.parametrize(
    ("make", "value", "shown"),
    [
        (show_bytes, 0, "0 B"),
        (show_bytes, 999, "999 B"),
        (show_bytes, 1000, "1 kB"),
        (show_bytes, 4_507_456, "4.51 MB"),
        (show_bytes, 99_949_999, "99.9 MB"),
        (show_bytes, 99_960_000, "100 MB"),
        (show_bytes, 999_600, "1 MB"),
        (show_bytes, 5 * 10**15, "5000 TB"),
        (show_count, 999, "999"),
        (show_count, 5_853_184, "5.85 M"),
        (show_count, 134_000_000, "134 M"),
        (visible, "ə Bakı “ok”", "ə Bakı “ok”"),
        (visible, "a\tb\u200bc\ud800", "a\\tb\\u200bc\\ud800"),
        (for_terminal, "a\tb\nc\rd\x9be\u200d", "a\tb\nc\\rd\\x9be\u200d"),
    ],
)
def test_how_things_are_shown(make: Any, value: Any, shown: str) -> None:
    assert make(value) == shown
