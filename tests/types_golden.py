"""Inputs for the type tests, and hashes of what ggml made of them.

The inputs are integer arithmetic, so they are the same everywhere. To make the hashes again, with the
libggml-base.so of a llama.cpp built for x86-64 without -march flags there (as its CMake files do):

    python tests/types_golden.py /path/to/libggml-base.so
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from quantize_cases import numbers

from azquant.types import TYPES

GOLDEN = Path(__file__).parent / "golden" / "types.json"
QUANTIZED = [
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q8_0",
    "q2_k",
    "q3_k",
    "q4_k",
    "q5_k",
    "q6_k",
    "iq4_nl",
    "iq4_xs",
    "tq1_0",
    "tq2_0",
    "mxfp4",
    "f16",
    "bf16",
]
DECODED = [
    *QUANTIZED,
    *["q8_k", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq1_s", "iq1_m", "nvfp4", "q1_0", "q2_0"],
]
ROWS, COLUMNS = 24, 1280


def weights(kind: str) -> NDArray[np.float32]:
    """(ROWS, COLUMNS): ordinary weights, and what quantizers stumble over."""
    x = numbers(kind, ROWS * COLUMNS, 1 / 8).reshape(ROWS, COLUMNS)
    if kind == "scales":  # from below fp16's smallest to just below its largest
        x *= np.float32(2) ** (np.arange(ROWS, dtype=np.float32)[:, None] * 7 - 146)
    elif kind == "ties":
        x = np.rint(x * 16)
    elif kind == "positive":
        x = np.abs(x) + np.float32(0.25)
    elif kind == "constant":
        x = np.repeat(x[:, :1], COLUMNS, axis=1) * (np.arange(COLUMNS) % 64 > 31)
    elif kind == "mixed":
        x *= np.float32(2) ** (np.rint(x * 40) % 60 - 50).astype(np.float32)
    return np.ascontiguousarray(x, np.float32)


KINDS = ("normal", "scales", "ties", "positive", "constant", "mixed")
IMPORTANCES: dict[str, NDArray[np.float32] | None] = {
    "plain": None,
    "imatrix": np.abs(numbers("imatrix", COLUMNS, 2.0)),
    "ones": np.ones(COLUMNS, np.float32),
}


def blocks(name: str) -> NDArray[np.uint8]:
    """Random bytes for 640 blocks; none of their scales is NaN."""
    type_ = TYPES[name]
    size = 640 * type_.block_bytes
    data = numbers("blocks " + name, size, 1.0).view(np.uint8)[::4].copy() ^ np.arange(size).astype(np.uint8)
    return data & 0xBB  # bits 2 and 6 clear: no fp16, bf16 or fp32 number is NaN or infinite


def sha(data: NDArray[Any]) -> str:
    """A short hash."""
    return hashlib.sha256(data.tobytes()).hexdigest()[:24]


def main(library: str) -> None:
    """Writes GOLDEN from what ``library`` makes."""
    ggml = ctypes.CDLL(library)
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
    quantized: dict[str, str] = {}
    for kind in KINDS:
        x = weights(kind)
        for how, importance in IMPORTANCES.items():
            for name in QUANTIZED:
                made = np.zeros(ROWS * TYPES[name].row_bytes(COLUMNS), np.uint8)
                given = None if importance is None else importance.ctypes.data
                ggml.ggml_quantize_chunk(
                    TYPES[name].id, x.ctypes.data, made.ctypes.data, 0, ROWS, COLUMNS, given
                )
                quantized[f"{name} {kind} {how}"] = sha(made)
    decoded = {}
    for name in DECODED:
        data = blocks(name)
        values = np.empty(640 * TYPES[name].block_size, np.float32)
        function = {"f16": "ggml_fp16_to_fp32_row", "bf16": "ggml_bf16_to_fp32_row"}.get(
            name, "dequantize_row_" + (name[:-1] + "K" if name.endswith("_k") else name)
        )
        getattr(ggml, function)(pointer(data.ctypes.data), pointer(values.ctypes.data), long(values.size))
        decoded[name] = sha(values)
    GOLDEN.write_text(json.dumps({"quantized": quantized, "decoded": decoded}, indent=0) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
