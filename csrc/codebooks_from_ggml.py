"""Makes csrc/azq_codebooks.h and azquant/_codebooks.py from the behaviour of an installed ggml.

The grids of the IQ types are part of the file format, but written down nowhere except in ggml's dequantizers.
So blocks that name each index in turn are decoded by those of xllamacpp, and the values read off.

    python csrc/codebooks_from_ggml.py
"""

import base64
import ctypes
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import xllamacpp

ROOT = Path(__file__).resolve().parent.parent
ONE = np.array([0x3C00], "<u2").view("u1")  # fp16 scale 1
LIBRARY = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))


def decode(name: str, block: np.ndarray) -> np.ndarray:
    """The 256 values of one block."""
    values = np.empty(256, np.float32)
    getattr(LIBRARY, f"dequantize_row_{name}")(
        ctypes.c_void_p(block.ctypes.data), ctypes.c_void_p(values.ctypes.data), ctypes.c_int64(256)
    )
    return values


def iq2_xxs(index: int) -> np.ndarray:
    group = np.array([index, 0, 0, 0, 0, 0, 0, 0], "u1")
    return decode("iq2_xxs", np.concatenate([ONE, np.tile(group, 8)]))[:8] * 8


def iq2_xs(index: int) -> np.ndarray:
    words = np.full(32, index, "<u2").view("u1")
    return decode("iq2_xs", np.concatenate([ONE, words, np.zeros(8, "u1")]))[:8] * 8


def iq2_s(index: int) -> np.ndarray:
    qs = np.concatenate([np.full(32, index & 255, "u1"), np.zeros(32, "u1")])
    return decode("iq2_s", np.concatenate([ONE, qs, np.full(8, index >> 8, "u1"), np.zeros(8, "u1")]))[:8] * 8


def iq3_xxs(index: int) -> np.ndarray:
    return decode("iq3_xxs", np.concatenate([ONE, np.full(64, index, "u1"), np.zeros(32, "u1")]))[:4] * 4


def iq3_s(index: int) -> np.ndarray:
    qs, qh = np.full(64, index & 255, "u1"), np.full(8, index >> 8, "u1")
    return decode("iq3_s", np.concatenate([ONE, qs, qh, np.zeros(36, "u1")]))[:4]


def iq1(index: int) -> np.ndarray:
    qs, qh = np.full(32, index & 255, "u1"), np.full(8, index >> 8, "<u2").view("u1")
    return decode("iq1_s", np.concatenate([ONE, qs, qh]))[:8] - 0.125


# name: entries, bits of a digit, value of each digit, what decodes an entry
GRIDS: dict[str, tuple[int, int, list[int], Callable[[int], np.ndarray]]] = {
    "iq2_xxs": (256, 2, [8, 25, 43], iq2_xxs),
    "iq2_xs": (512, 2, [8, 25, 43], iq2_xs),
    "iq2_s": (1024, 2, [8, 25, 43], iq2_s),
    "iq3_xxs": (256, 3, [4, 12, 20, 28, 36, 44, 52, 62], iq3_xxs),
    "iq3_s": (512, 3, list(range(1, 16, 2)), iq3_s),
    "iq1": (2048, 2, [-1, 0, 1], iq1),
}


def grid(name: str) -> np.ndarray:
    """One 16-bit number per entry: the digits of its 4 or 8 values, first in the low bits."""
    entries, bits, values, read = GRIDS[name]
    digits = [[values.index(round(float(v))) for v in read(i)] for i in range(entries)]
    return np.array([sum(d << bits * j for j, d in enumerate(entry)) for entry in digits], "<u2")


def header(grids: dict[str, np.ndarray]) -> Iterator[str]:
    yield "/* Made by codebooks_from_ggml.py; not to be edited. One number per entry: its values' digits, two"
    yield " * bits each for IQ1 (-1, 0, 1) and IQ2 (8, 25, 43), three for IQ3, first in the low bits. */"
    yield "#ifndef AZQ_CODEBOOKS_H\n#define AZQ_CODEBOOKS_H\n#include <stdint.h>"
    for name, numbers in grids.items():
        yield f"\nstatic const uint16_t azq_{name}_grid[{len(numbers)}] = {{"
        for at in range(0, len(numbers), 18):
            yield "    " + " ".join(f"{n}," for n in numbers[at : at + 18])
        yield "};"
    yield "\n#endif"


def module(grids: dict[str, np.ndarray]) -> Iterator[str]:
    packed = base64.b85encode(zlib.compress(b"".join(g.tobytes() for g in grids.values()), 9)).decode()
    yield '"""The IQ grids for NumPy. Made by csrc/codebooks_from_ggml.py; not to be edited."""'
    yield "\nfrom __future__ import annotations\n"
    yield '__all__ = ["PACKED", "SIZES"]\n'
    yield "SIZES = {" + ", ".join(f'"{name}": {len(g)}' for name, g in grids.items()) + "}"
    yield '"""Entries of each grid, in their order in PACKED."""\n\nPACKED = ('
    for at in range(0, len(packed), 96):
        yield f'    "{packed[at : at + 96]}"'
    yield ')\n"""Base85 of zlib of one little-endian uint16 per entry."""'


def main() -> None:
    """Writes both files."""
    grids = {name: grid(name) for name in GRIDS}
    (ROOT / "csrc" / "azq_codebooks.h").write_text("\n".join(header(grids)) + "\n")
    (ROOT / "azquant" / "_codebooks.py").write_text("\n".join(module(grids)) + "\n")


if __name__ == "__main__":
    main()
