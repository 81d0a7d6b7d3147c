"""Makes golden.h: hashes of the bytes that ggml's own quantizers and dequantizers make of a fixed input.

Run it from anywhere, with gguf and xllamacpp installed (both are in the ``test`` extra)::

    python tests/c/make_golden.py           # rewrites golden.h
    python tests/c/make_golden.py --check   # exits 1 when golden.h is not what it would write

The bytes come from libggml inside xllamacpp and are compared with gguf's NumPy quantizers, so two
implementations that nobody here wrote must agree. They differ in one known place: a Q4_0 block of zeros has
the scale 0x8000 (-0) in C and 0x0000 in gguf; the C reference is right.

``golden_input`` is also what tests/test_quantize.py feeds azquant with; golden_input() of check_golden.c is
the same generator in C.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

ROWS, COLUMNS = 256, 512
BLOCK = 32
HEADER = Path(__file__).resolve().parent / "golden.h"
TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "BF16": 30}

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def golden_input() -> Floats:
    """(ROWS, COLUMNS) float32 from splitmix64; blocks of every eighth kind are special."""
    index = np.arange(1, ROWS * COLUMNS + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = np.uint64(0x617A7175616E74) + index * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    z = (z ^ z >> np.uint64(31)).reshape(-1, BLOCK)
    mantissa = ((z >> np.uint64(40)).astype(np.int64) - (1 << 23)).astype(np.float32)  # 24 bits
    low = (z & np.uint64(255)).astype(np.float32)
    odd = (z & np.uint64(1)).astype(bool)
    # Usual elements: 24 random bits, magnitudes spread over 2^-8 .. 1.
    x = np.ldexp(mantissa, -23 - (z & np.uint64(7)).astype(np.int32))
    special = {
        0: np.zeros_like(x),
        1: np.where(odd, np.float32(-0.0), np.float32(0.0)),
        2: np.where(odd, np.float32(-0.75), np.float32(0.75)),  # every element ties for the largest
        3: np.ldexp(mantissa, -146),  # subnormal elements and fp16 scales of 0
        4: np.ldexp(mantissa, -8),  # up to 2^15
        5: (low - np.float32(128)) * np.float32(0.5),  # halves
        6: np.ldexp(mantissa, -46),  # subnormal fp16 scales
    }
    kind = np.arange(len(x)) % 16
    for number, values in special.items():
        x[kind == number] = values[kind == number]
    x[kind == 5, 0] = -64  # -8 times a power of two: Q4_0's scale is exact, so the halves are ties
    return x.reshape(ROWS, COLUMNS)


def fnv1a(data: bytes) -> int:
    """64-bit FNV-1a."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def libggml() -> ctypes.CDLL:
    """The ggml library inside xllamacpp."""
    import xllamacpp

    return ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))


def reference(ggml: ctypes.CDLL, name: str, x: Floats) -> tuple[Bytes, Floats]:
    """ggml's bytes, and the values it reads back from them."""
    import gguf

    kind = gguf.GGMLQuantizationType[name]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    encoded = np.empty(x.size // elements * size, dtype=np.uint8)
    decoded = np.empty_like(x)
    encode, decode = {
        "F16": ("ggml_fp32_to_fp16_row", "ggml_fp16_to_fp32_row"),
        "BF16": ("ggml_fp32_to_bf16_row_ref", "ggml_bf16_to_fp32_row"),
    }.get(name, (f"quantize_row_{name.lower()}_ref", f"dequantize_row_{name.lower()}"))
    if name == "F32":
        return x.view(np.uint8).reshape(-1), x

    def call(function: str, source: npt.NDArray[np.generic], target: npt.NDArray[np.generic]) -> None:
        c: Callable[..., None] = getattr(ggml, function)
        c(ctypes.c_void_p(source.ctypes.data), ctypes.c_void_p(target.ctypes.data), ctypes.c_int64(x.size))

    call(encode, x, encoded)
    call(decode, encoded, decoded)
    with np.errstate(all="ignore"):  # inverses of subnormal scales overflow
        ours = gguf.quants.quantize(x, kind).view(np.uint8).reshape(-1)
    if name == "Q4_0":
        blocks = ours.reshape(-1, 18)
        zero = ~x.reshape(-1, BLOCK).any(axis=1)
        blocks[zero, :2] = (0x00, 0x80)
    if not np.array_equal(ours, encoded):
        raise SystemExit(f"{name}: gguf and libggml disagree")
    values = gguf.quants.dequantize(encoded.reshape(x.shape[0], -1), kind)
    if not np.array_equal(values.view(np.uint32), decoded.view(np.uint32)):
        raise SystemExit(f"{name}: gguf and libggml disagree on the values")
    return encoded, decoded


def header() -> str:
    """The text of golden.h."""
    x = golden_input()
    ggml = libggml()
    lines = [
        "/* Made by make_golden.py from libggml; do not edit. FNV-1a 64 of the blocks and of the values. */",
        f"enum {{ GOLDEN_ROWS = {ROWS}, GOLDEN_COLUMNS = {COLUMNS} }};",
        f"static const uint64_t golden_input_hash = 0x{fnv1a(x.tobytes()):016x}u;",
        "static const struct {",
        "    int type;",
        "    uint64_t blocks, values;",
        "} goldens[] = {",
    ]
    for name in TYPES:
        encoded, decoded = reference(ggml, name, x)
        hashes = (f"0x{fnv1a(array.tobytes()):016x}u" for array in (encoded, decoded))
        lines.append(f"    {{AZQ_TYPE_{name}, {', '.join(hashes)}}},")
    return "\n".join([*lines, "};", ""])


def main() -> int:
    """Writes or checks the file."""
    parser = argparse.ArgumentParser(description="make golden.h from libggml")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    text = header()
    if arguments.check:
        return int(HEADER.read_text(encoding="utf-8") != text)
    HEADER.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
