"""Classes 1 to 48 of the catalogue of bad input on every path that reads files: see tests/hostile.py.

What exactly each reader says is tested beside it; here, that no path through the program crashes, hangs,
eats memory, lets a foreign exception out or leaves a partial file.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import sys
from pathlib import Path
from typing import Any

import hostile
import pytest
from convert_support import GPT2_CONFIG, gpt2_tensors, write_checkpoint
from gguf_builder import ARRAY, STRING, U8, array, gguf, info, pair, text
from hostile import judge, run_actions
from test_gguf_bad_input import LOADED, REFUSED, nested, small_file

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs fork, /proc and RLIMIT_AS"
)

READING = ["open", "inspect", "inspect table", "verify", "verify against itself"]
WRITING = ["edit", "split", "merge", "convert", "quantize"]
WRITES = {
    "edit": ["edited.gguf"],
    "split": ["cut-00001-of-00001.gguf"],
    "merge": ["merged.gguf"],
    "quantize": ["quantized.gguf"],
}


def check(results: list[dict[str, Any]], expected: int) -> None:
    """Every outcome kept the promise, and only what succeeded wrote something: one whole file."""
    broken = [
        f"{r['action']} {Path(r['path']).name}: {r['outcome']}" for r in results if r["outcome"][0] == "!"
    ]
    assert not broken, "\n".join(broken[:20])
    assert len(results) == expected
    for r in results:
        wanted = WRITES.get(r["action"], []) if r["outcome"] == "ok" else []
        if r["action"] == "convert" and r["outcome"] == "ok":
            wanted = ["converted.gguf"]
        assert r["left"] == wanted, f"{r['action']} {r['path']}: {r['outcome']} left {r['left']}"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def save(folder: Path, files: dict[str, bytes]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = []
    for number, content in enumerate(files.values()):
        path = folder / f"{number:03}.gguf"
        path.write_bytes(content)
        paths.append(path)
    return paths


def test_classes_1_to_30(tmp_path: Path, out: Path) -> None:
    refused = save(tmp_path / "refused", {name: content for name, (content, _, _) in REFUSED.items()})
    names = ["open", "inspect", "verify", "edit", "convert", "quantize", "load"]
    results = run_actions(names, refused, out)
    check(results, len(names) * len(refused))
    assert {r["outcome"][:7] for r in results} == {"refused"}
    names = READING + WRITING + ["load"]
    loaded = save(tmp_path / "loaded", LOADED)
    check(run_actions(names, loaded, out), len(names) * len(loaded))


def test_many_small_parts(tmp_path: Path, out: Path) -> None:
    """Where a byte of the file could cost many of memory, or a loop without an end."""
    one = text("a")
    paths = save(
        tmp_path / "many",
        {
            "strings": gguf([pair("k", ARRAY, array(STRING, 1 << 18, bytes(8 << 18)))]),
            "tokens": gguf([pair("tokenizer.ggml.tokens", ARRAY, array(STRING, 1 << 18, one * (1 << 18)))]),
            "numbers": gguf([pair("k", ARRAY, array(U8, 1 << 22, bytes(1 << 22)))]),
            "nested": gguf([pair("k", ARRAY, array(ARRAY, 30_000, array(U8, 0, b"") * 30_000))]),
            "deep": gguf([pair(f"k{i}", ARRAY, nested(8)) for i in range(500)]),
            "tensors": gguf([], [info(f"t{i}", [0]) for i in range(8_000)]),
            "long": gguf([pair("k", STRING, text(b"\xff" * (1 << 22)))]),
            "keys": gguf([pair(f"k{i}", U8, b"\1") for i in range(8_000)]),
        },
    )
    names = ["open", "verify", "edit", "quantize"]
    check(run_actions(names, paths, out), len(names) * len(paths))


def test_every_truncation_on_every_path(tmp_path: Path, out: Path) -> None:
    content = small_file()
    paths = save(tmp_path / "cut", {str(n): content[:n] for n in range(0, len(content), 7)})
    names = ["verify", "edit", "split", "convert", "quantize"]
    results = run_actions(names, paths, out)
    check(results, len(names) * len(paths))


def test_files_of_others_and_models_made_wrong(shared_data: Path, tmp_path: Path, out: Path) -> None:
    """Class 26's prefixes of a real model, classes 31 to 38, and files found in the wild."""
    paths = [
        *sorted((shared_data / "bad-gguf/model-level").glob("*.gguf")),
        *sorted((shared_data / "bad-gguf/llamacpp-test-gguf").glob("*.gguf")),
        *sorted((shared_data / "bad-real").glob("*")),
    ]
    assert len(paths) > 60
    names = ["open", "inspect", "verify", "edit", "convert", "quantize", "load"]
    check(run_actions(names, paths, out), len(names) * len(paths))


def folders(tmp_path: Path) -> list[Path]:
    """Checkpoint folders that are wrong in their weights' file."""
    good = write_checkpoint(tmp_path / "good", GPT2_CONFIG, gpt2_tensors(GPT2_CONFIG))
    content = (good / "model.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header, data = content[8 : 8 + length], content[8 + length :]

    def packed(header: bytes, data: bytes = data, length: int | None = None) -> bytes:
        return struct.pack("<Q", len(header) if length is None else length) + header + data

    table = json.loads(header)
    first = next(name for name in table if name != "__metadata__")

    def changed(**changes: Any) -> bytes:
        return json.dumps({**table, first: {**table[first], **changes}}).encode()

    start, stop = table[first]["data_offsets"]
    wrong: dict[str, bytes | dict[str, bytes]] = {
        "39 empty": b"",
        "39 eight bytes": bytes(8),
        "39 longer than the file": packed(header, length=len(content) * 2),
        "39 100 MB": packed(header, length=100_000_001),
        "39 2^64-1": packed(header, length=2**64 - 1),
        "40 not UTF-8": packed(b"{\xff" + header[2:]),
        "40 not JSON": packed(b"{" * len(header)),
        "40 twice": packed(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},' * 2 + header[1:]),
        "40 deep": packed(b"[" * 500_000),
        "40 deep in braces": packed(b'{"a":' * 200_000),
        "41 overlap": packed(changed(data_offsets=[start, stop + 4])),
        "41 trailing": content + b"GGUF" * 20,
        "41 missing": content[:-1],
        "42 shape": packed(changed(shape=[2, 18446744073709551614])),
        "42 negative": packed(changed(shape=[-1, 3])),
        "42 huge number": packed(header.replace(b"[", b"[" + b"9" * 5000 + b",", 1)),
        "43 empty tensors": packed(b'{"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', b""),
        "43 padded": packed(header + b" " * 4096),
        "44 outside": {
            "model.safetensors.index.json": json.dumps({"weight_map": {first: "../../etc/passwd"}}).encode()
        },
        "44 missing shard": {
            "model.safetensors.index.json": json.dumps({"weight_map": {first: "gone.safetensors"}}).encode()
        },
        "44 no map": {"model.safetensors.index.json": b"[]"},
        "46 truncated zip": {"pytorch_model.bin": b"PK\x03\x04" + bytes(100)},
        "46 no pickle": {"pytorch_model.bin": b"\x80\x02}q\x00."},
        "46 LFS": {"pytorch_model.bin": b"version https://git-lfs.github.com/spec/v1\n"},
        "config no JSON": {"model.safetensors": content, "config.json": b"{"},
        "config list": {"model.safetensors": content, "config.json": b"[]"},
        "config deep": {"model.safetensors": content, "config.json": b"[" * 300_000},
        "config huge": {
            "model.safetensors": content,
            "config.json": json.dumps({**GPT2_CONFIG, "n_layer": 10**9}).encode(),
        },
        "config negative": {
            "model.safetensors": content,
            "config.json": json.dumps({**GPT2_CONFIG, "n_head": -1}).encode(),
        },
    }
    result = []
    for number, files in enumerate(wrong.values()):
        folder = tmp_path / f"bad{number:02}"
        folder.mkdir()
        shutil.copy(good / "config.json", folder)
        for name, data in (files if isinstance(files, dict) else {"model.safetensors": files}).items():
            (folder / name).write_bytes(data)
        result.append(folder)
    return [good, *result]


def test_classes_39_to_48_on_conversion_and_comparison(tmp_path: Path, out: Path, shared_data: Path) -> None:
    shutil.copy(shared_data / "stories260K/stories260K-F32.gguf", tmp_path / "good.gguf")
    paths = folders(tmp_path)
    paths += sorted((shared_data / "bad-safetensors").glob("*"))
    for number, path in enumerate(sorted((shared_data / "bad-safetensors").glob("*.safetensors"))):
        folder = tmp_path / f"theirs{number:02}"
        folder.mkdir()
        shutil.copy(path, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(GPT2_CONFIG))
        paths.append(folder)
    names = ["convert", "verify against"]
    results = run_actions(names, paths, out)
    check(results, len(names) * len(paths))


def test_the_judge_sees_what_is_wrong(tmp_path: Path) -> None:
    """That the checks above can fail: a crash, a hang, memory, a foreign exception."""

    def use_memory() -> bytes:
        return bytes(300_000_000)

    def spin() -> None:
        while True:
            pass

    assert judge(lambda: os.kill(os.getpid(), signal.SIGUSR1), 0) == "!ended by SIGUSR1"
    assert judge(use_memory, 0).startswith("!MemoryError")
    assert judge(lambda: [].pop(), 0).startswith("!IndexError")
    assert judge(lambda: None, 0) == "ok"
    hostile.WALL_SECONDS, before = 1, hostile.WALL_SECONDS
    try:
        assert judge(spin, 0) == "!ended by SIGALRM"
    finally:
        hostile.WALL_SECONDS = before
