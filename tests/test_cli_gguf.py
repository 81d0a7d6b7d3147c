"""The verbs that work on GGUF files: edit, verify, split, merge, and inspect's hashes and picture."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result
from gguf_builder import ARRAY, BOOL, F32, I32, STRING, U16, array, info, pair, text
from gguf_builder import gguf as build

from azquant.cli import cli
from azquant.gguf import TensorSpec, keys, open_gguf, write_gguf
from azquant.types import get_type


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    pairs = [
        pair("general.name", STRING, text("old")),
        pair("n", U16, b"\7\0"),
        pair("flag", BOOL, b"\0"),
        pair("rate", F32, bytes(4)),
        pair("ids", ARRAY, array(I32, 1, bytes(4))),
    ]
    path = tmp_path / "in.gguf"
    path.write_bytes(build(pairs, [info("a", [8]), info("b", [8], 0, 32)], bytes(64)))
    return path


def test_edit_in_place(source: Path) -> None:
    chat = source.parent / "chat.txt"
    chat.write_text("{{ ə }}", encoding="utf-8")
    result = run(
        "edit", source,
        "--set", "n", "0x10", "--set", "flag", "yes", "--set", "rate", "0.5", "--set", "ids", "[1, -2]",
        "--set-file", "general.name", chat,
        "--add", "my.key", "u64", str(2**64 - 1), "--add", "my.list", "string[]", '["a", "ə"]',
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"wrote {source}" in result.output
    fields = {k: f.contents() for k, f in gguf.GGUFReader(source).fields.items() if not k.startswith("GGUF.")}
    assert fields == {
        "general.name": "{{ ə }}",
        "n": 16,
        "flag": True,
        "rate": 0.5,
        "ids": [1, -2],
        "my.key": 2**64 - 1,
        "my.list": ["a", "ə"],
    }


def test_edit_dry_run_says_what_would_change(source: Path) -> None:
    before = source.read_bytes()
    result = run("edit", source, "--set", "n", "8", "--remove", "flag", "--dry-run", "--json")
    assert result.exit_code == 0
    assert json.loads(result.output)["changes"] == [
        {"key": "n", "type": "uint16", "before": 7, "after": 8},
        {"key": "flag", "type": "bool", "before": False, "after": None},
    ]
    assert "was not written" in run("edit", source, "--set", "n", "8", "--dry-run").output
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to change"),
        (["--set", "n", "seven"], "key 'n': 'seven' is no uint16"),
        (["--set", "n", "70000"], "key 'n': int 70000 is outside the range of UINT16"),
        (["--set", "ids", "{}"], "key 'ids': '{}' is no JSON list"),
        (["--set", "flag", "maybe"], "key 'flag': 'maybe' is no bool"),
        (["--set", "general.nam", "x"], "no key 'general.nam' (is 'general.name' meant?)"),
        (["--set", "n", "1", "--set", "n", "2"], "key 'n' is given a value twice"),
        (["--add", "n", "u8", "1"], "has a key 'n' already"),
        (["--add", "x", "q4_0", "1"], "'q4_0' is no type of metadata"),
        (["--add", "x", "u8", "300"], "key 'x': int 300 is outside"),
        (["--remove", "gone"], "no key 'gone'"),
        (["--set-file", "n", "/nonexistent"], "/nonexistent cannot be read"),
    ],
)
def test_edit_refuses(source: Path, options: list[str], message: str) -> None:
    before = source.read_bytes()
    result = run("edit", source, *options)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert source.read_bytes() == before


def test_split_and_merge(source: Path) -> None:
    result = run("split", source, source.parent / "cut", "--max-size", "32")
    assert result.exit_code == 0, result.output
    shards = sorted(source.parent.glob("cut-*.gguf"))
    assert [line.split()[1] for line in result.output.splitlines()] == [str(path) for path in shards]
    assert len(shards) == 2
    shown = run("inspect", shards[0])
    assert "and 1 more" in shown.output
    assert run("inspect", shards[1]).exit_code == 2
    merged = source.parent / "merged.gguf"
    assert run("merge", shards[0], merged).exit_code == 0
    assert merged.read_bytes() == source.read_bytes()
    assert "already exists" in run("merge", shards[0], merged).output
    for size in ("0", "1.5G", "x", "5T"):
        assert "is no size; write 500M or 2G" in run("split", source, "x", "--max-size", size).output


def test_verify_compares(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((4, 64), dtype=np.float32)
    blocks = gguf.quantize(weights, gguf.GGMLQuantizationType.Q4_0)
    for name, kind, data in (("q", "q4_0", blocks), ("f", "f32", weights)):
        spec = TensorSpec("blk.0.w", (4, 64), get_type(kind))
        write_gguf(tmp_path / f"{name}.gguf", {"x": keys.u8(1)}, [spec], lambda spec, data=data: [data])
    picture = tmp_path / "errors.png"
    arguments = ["verify", tmp_path / "q.gguf", "--against", tmp_path / "f.gguf"]
    result = run(*arguments, "--hash", "--plot", picture)
    assert result.exit_code == 0, result.output
    assert "nothing wrong" in result.output
    assert "worst: blk.0.w at " in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    report = json.loads(run(*arguments, "--json").output)
    assert report["ok"] is True
    assert report["worst"] == "blk.0.w"
    assert report["tensors"][0]["reproduced"] is True
    error = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0) - weights.astype(np.float64)
    assert report["tensors"][0]["rmse"] == pytest.approx(math.sqrt((error**2).mean()))
    assert "already exists" in run(*arguments, "--plot", picture).output
    assert "give --against too" in run("verify", tmp_path / "q.gguf", "--plot", picture).output


def test_verify_finds_problems(tmp_path: Path) -> None:
    path = tmp_path / "nan.gguf"
    path.write_bytes(build([], [info("a", [8])], struct.pack("<f", math.nan) + bytes(28)))
    result = run("verify", path)
    assert result.exit_code == 2
    assert "azquant: problem: tensor 'a': 1 elements are not finite, the first is number 0" in result.output
    assert "nothing wrong" not in result.output
    result = run("verify", path, "--json")
    assert result.exit_code == 2
    assert json.loads(result.output)["ok"] is False


def test_inspect_hashes_and_draws(source: Path) -> None:
    picture = source.parent / "types.png"
    result = run("inspect", source, "--hash", "--plot", picture)
    assert result.exit_code == 0, result.output
    # head -c 32 /dev/zero | sha256sum
    zeros = "66687aadf862bd776c8fc18b8e9f8e20089714856ee233b3902a591d0d5f2925"
    assert zeros in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    tensors = json.loads(run("inspect", source, "--hash", "--json").output)["tensors"]
    assert [tensor["sha256"] for tensor in tensors] == [zeros, zeros]
    assert "sha256" not in json.loads(run("inspect", source, "--json").output)["tensors"][0]
    with open_gguf(source) as file:
        assert list(file.tensors) == ["a", "b"]
