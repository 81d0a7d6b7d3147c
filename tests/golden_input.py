"""The input and the hashes of tests/c/golden.h, for the Python tests: made by tests/c/make_golden.py."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

FOLDER = Path(__file__).resolve().parent / "c"

_spec = importlib.util.spec_from_file_location("make_golden", FOLDER / "make_golden.py")
assert _spec is not None and _spec.loader is not None
_make_golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_make_golden)


def golden_input() -> npt.NDArray[np.float32]:
    """The generator's float32 matrix."""
    x: npt.NDArray[np.float32] = _make_golden.golden_input()
    return x


def fnv1a(array: npt.NDArray[np.generic]) -> int:
    """64-bit FNV-1a of an array's bytes."""
    value: int = _make_golden.fnv1a(array.tobytes())
    return value


def golden_hashes() -> dict[str, tuple[int, int]]:
    """Type name -> (hash of the blocks, hash of the float32 values), as libggml makes them."""
    text = (FOLDER / "golden.h").read_text(encoding="utf-8")
    rows = re.findall(r"\{AZQ_TYPE_(\w+), (0x\w+)u, (0x\w+)u\}", text)
    return {name.lower(): (int(blocks, 16), int(values, 16)) for name, blocks, values in rows}


def golden_input_hash() -> int:
    """Hash of the input."""
    text = (FOLDER / "golden.h").read_text(encoding="utf-8")
    found = re.search(r"golden_input_hash = (0x\w+)u", text)
    assert found is not None
    return int(found[1], 16)
