"""What lets commands and loading begin early gives what doing one thing after the other gives."""

from __future__ import annotations

import hashlib
import importlib
import os
import random
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from azquant import _hashing
from azquant.cli import _VERBS, cli
from azquant.errors import InputFileError
from azquant.gguf.values import GGUFArray

Run = Callable[..., Any]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    made = [tmp_path / name for name in ("a", "b", "empty")]
    for path, size in zip(made, (1 << 20, 3 << 24, 0), strict=True):
        path.write_bytes(random.Random(size).randbytes(size))
    return made


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_hashes_are_sha256(files: list[Path]) -> None:
    assert _hashing.file_hashes(files) == [sha256(path) for path in files]


def test_hashes_begun_ahead_are_taken_over(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    real = _hashing._file_hash

    def counted(path: Path, stop: threading.Event) -> str:
        hashed.append(path)
        return real(path, stop)

    monkeypatch.setattr(_hashing, "_file_hash", counted)
    wanted = [sha256(path) for path in files]
    with _hashing.hashing_ahead(files[:2]), _hashing.hashing(files) as hashes:
        assert hashes() == wanted
    assert sorted(hashed) == sorted(files)
    assert not _hashing._ahead


def test_a_file_changed_since_it_was_hashed_ahead_is_hashed_again(files: list[Path]) -> None:
    with _hashing.hashing_ahead(files):
        files[0].write_bytes(b"other bytes")
        assert _hashing.file_hashes(files) == [sha256(path) for path in files]


def test_what_cannot_be_hashed_is_told_by_who_asks(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    places = [missing, tmp_path]
    if hasattr(os, "mkfifo"):  # opening it would wait for ever
        os.mkfifo(tmp_path / "pipe")
        places.append(tmp_path / "pipe")
    with _hashing.hashing_ahead(places):
        assert not _hashing._ahead
        with pytest.raises(InputFileError, match="missing"):
            _hashing.file_hashes([missing])


def test_hashing_ends_with_its_block(files: list[Path]) -> None:
    with _hashing.hashing_ahead(files):
        pass
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("azquant-hash")]


def test_every_verb_has_its_module_and_its_name() -> None:
    assert {name: cli.commands[name].name for name in cli.commands} == {name: name for name in _VERBS}


def test_help_of_one_verb_imports_no_other_and_no_numpy(run_python: Run) -> None:
    done = run_python(
        "import sys\nfrom azquant.cli import main\n"
        "try:\n    main(['convert', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(*sorted(name for name in sys.modules if name.startswith(('azquant.cli.', 'numpy'))))"
    )
    loaded = done.stdout.split()
    assert "azquant.cli.convert" in loaded
    assert not {"numpy", "azquant.cli.bench", "azquant.cli.chat"} & set(loaded)


def test_numpy_is_imported_without_leaving_a_trace_in_the_environment(run_python: Run) -> None:
    done = run_python(
        "import os, sys\nfrom azquant.cli.startup import import_numpy\n"
        "before = dict(os.environ)\nimport_numpy()\n"
        "print('numpy' in sys.modules, dict(os.environ) == before)"
    )
    assert done.stdout.split() == ["True", "True"]


def test_all_public_names_are_there() -> None:
    azquant = importlib.import_module("azquant")
    for name in (*azquant.__all__, "cpu", "ops", "tensor", "types"):
        assert getattr(azquant, name) is not None
        assert name in dir(azquant)


def cuts(tokens: list[str]) -> list[list[int]]:
    ids = {text: i for i, text in enumerate(tokens)}
    return [
        [i, ids[text[:at]], ids[text[at:]]]
        for i, text in enumerate(tokens)
        for at in range(1, len(text))
        if text[:at] in ids and text[at:] in ids
    ]


@pytest.mark.parametrize("backend", ["azquant._native", "azquant._fallback"])
def test_cuts_are_all_ways_to_make_a_token_of_two(backend: str) -> None:
    if backend == "azquant._native":
        pytest.importorskip("azquant._azquant", reason="the C extension is not built")
    kernels = importlib.import_module(backend)
    draw = random.Random(3)
    for alphabet in ("ab", "a\u0259\u2581", "a\udc80\U0001f600"):  # and a byte that was no UTF-8
        for most in (0, 1, 2, 30, 300):
            texts = {"".join(draw.choices(alphabet, k=draw.randint(0, 6))) for _ in range(most)}
            tokens = draw.sample(sorted(texts), len(texts))
            assert kernels.vocabulary_cuts(tokens).tolist() == cuts(tokens)
    nested = ["a" * n for n in range(1, 200)]  # far more cuts than tokens
    assert kernels.vocabulary_cuts(nested).tolist() == cuts(nested)


@pytest.mark.parametrize("backend", ["azquant._native", "azquant._fallback"])
def test_merges_are_the_cuts_by_score_then_by_their_parts(backend: str) -> None:
    if backend == "azquant._native":
        pytest.importorskip("azquant._azquant", reason="the C extension is not built")
    kernels = importlib.import_module(backend)
    draw = random.Random(5)
    for most in (0, 1, 40, 400):
        tokens = sorted({"".join(draw.choices("ab\u0259", k=draw.randint(1, 6))) for _ in range(most)})
        draw.shuffle(tokens)
        scores = [draw.choice([0.0, -0.0, -1.5, 2.0, float("-inf"), 1e-300]) for _ in tokens]
        wanted = sorted(cuts(tokens), key=lambda cut: (-scores[cut[0]], cut[1], cut[2]))
        left, right = kernels.vocabulary_merges(tokens, scores)
        assert list(zip(left, right, strict=True)) == [(cut[1], cut[2]) for cut in wanted]
    left, right = kernels.vocabulary_merges(["a", "b", "ab", "ba", "aa"], [0, 0, float("nan"), -9.0, -8.0])
    assert list(zip(left, right, strict=True)) == [(0, 0), (1, 0), (0, 1)]


def encoded(items: list[bytes], order: str) -> memoryview:
    """A GGUF array of strings."""
    parts = (struct.pack(order + "Q", len(item)) + item for item in items)
    return memoryview(struct.pack(order + "IQ", 8, len(items)) + b"".join(parts))


@pytest.mark.parametrize("backend", ["c", "numpy"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_strings_are_halved_at_the_first_space_that_is_not_their_first_character(
    order: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "c":
        pytest.importorskip("azquant._azquant", reason="the C extension is not built")
    name = {"c": "azquant._native", "numpy": "azquant._fallback"}[backend]
    monkeypatch.setattr("azquant._backend.kernels", lambda: importlib.import_module(name))

    def halves(*texts: str | bytes) -> list[tuple[str, str]] | None:
        items = [text.encode() if isinstance(text, str) else text for text in texts]
        data = encoded(items, order)
        return GGUFArray(data, 0, len(data), order).halves()

    assert halves() == []
    assert halves("a b", "  b", " \u0259 ", "a b c") == [
        ("a", "b"),
        (" ", "b"),
        (" \u0259", ""),
        ("a", "b c"),
    ]
    for odd in ("ab", "", " ", "a\0 b", b"\xff b"):
        assert halves("a b", odd) is None
    numbers = memoryview(struct.pack(order + "IQI", 4, 1, 7))
    assert GGUFArray(numbers, 0, len(numbers), order).halves() is None


def test_strings_decoded_together_are_those_decoded_one_by_one() -> None:
    draw = random.Random(4)
    letters = ["a", "b", "\u0259", "\u2581", "\U0001f600"]
    broken = [bytes([n]) for n in (0x00, 0x80, 0xE2, 0x96, 0x81, 0xF0, 0x9F, 0x61)]
    for number, count in enumerate((64, 65, 4095, 4096, 4097, 9000, *[100] * 60)):
        items = []
        for _ in range(count):
            if number % 3 == 2 and draw.random() < 0.1:  # also such that only together are UTF-8
                items.append(b"".join(draw.choices(broken, k=draw.randint(0, 4))))
            else:
                items.append("".join(draw.choices(letters[: 2 + number % 4], k=draw.randint(0, 6))).encode())
        data = encoded(items, "<")
        array = GGUFArray(data, 0, len(data), "<")
        wanted = [item.decode("utf-8", "surrogateescape") for item in items]
        assert array.tolist() == wanted
        assert array[7:] == wanted[7:]
