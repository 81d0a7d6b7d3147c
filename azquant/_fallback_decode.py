"""NumPy dequantizers: blocks of every ggml type back to float32, bit by bit as the C kernels do it.

Each takes the blocks' bytes and gives (blocks, elements of a block) float32. The layouts stand in
csrc/azq_blocks.h.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from azquant._codebooks import PACKED, SIZES

__all__ = ["DECODERS", "E2M1", "IQ4_VALUES", "bits_of", "e8m0", "half", "k4_scales", "q3_scales"]

Array = npt.NDArray[Any]  # uint8 for bytes and codes, float32 for values

IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
"""Twice the values of E2M1; the scales that go with it are halved."""


def half(blocks: Array, at: int) -> Array:
    """The fp16 scale at byte ``at`` of each block: (blocks, 1)."""
    return blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)


def bits_of(data: Array, width: int, order: int) -> Array:
    """(blocks, n) bytes -> (blocks, n * 8 / width) fields: of each run of ``order`` bytes first all lowest
    fields, then all next ones."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    runs: Array = data.reshape(len(data), -1, 1, order) >> shifts & np.uint8((1 << width) - 1)
    return runs.reshape(len(data), -1)


def _nibbles(blocks: Array, at: int) -> Array:
    return bits_of(blocks[:, at : at + 16], 4, 16)


def _fives(blocks: Array, at: int) -> Array:
    fifth = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")
    return _nibbles(blocks, at + 4) | fifth << 4


def e8m0(e: Array) -> Array:
    """2^(e - 127) / 2."""
    wide = e.astype(np.uint32)
    bits = np.where(wide < 2, np.uint32(0x200000) << np.minimum(wide, 1), wide - 1 << 23)
    return bits.astype(np.uint32).view(np.float32)


def _ue4m3(byte: Array) -> Array:
    exponent, mantissa = (byte >> 3 & 15).astype(np.int32), (byte & 7).astype(np.int32)
    fraction = np.where(exponent > 0, mantissa + 8, mantissa).astype(np.float32)
    value = np.ldexp(fraction, np.maximum(exponent, 1) - 11).astype(np.float32)
    return np.where((byte == 0) | (byte == 0x7F), np.float32(0), value)


def _spread(scales: Array, n: int) -> Array:
    """One scale per group -> one per element."""
    return np.repeat(scales, n, axis=1)


def _f32(q: Array) -> Array:
    return q.astype(np.float32)


def k4_scales(packed: Array) -> tuple[Array, Array]:
    """The 12 bytes of Q4_K and Q5_K -> scales and minima, (blocks, 8) each."""
    low, mid, high = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, high & 15 | low >> 6 << 4], axis=1)
    return scales, np.concatenate([mid & 63, high >> 4 | mid >> 6 << 4], axis=1)


def q3_scales(packed: Array) -> Array:
    """The 12 bytes of Q3_K -> (blocks, 16)."""
    return bits_of(packed[:, :8], 4, 8) | bits_of(packed[:, 8:], 2, 4) << 4


def _q4_0(data: Array) -> Array:
    b = data.reshape(-1, 18)
    return (_f32(_nibbles(b, 2)) - np.float32(8)) * half(b, 0)


def _q4_1(data: Array) -> Array:
    b = data.reshape(-1, 20)
    return _f32(_nibbles(b, 4)) * half(b, 0) + half(b, 2)


def _q5_0(data: Array) -> Array:
    b = data.reshape(-1, 22)
    return (_f32(_fives(b, 2)) - np.float32(16)) * half(b, 0)


def _q5_1(data: Array) -> Array:
    b = data.reshape(-1, 24)
    return _f32(_fives(b, 4)) * half(b, 0) + half(b, 2)


def _q8_0(data: Array) -> Array:
    b = data.reshape(-1, 34)
    return _f32(b[:, 2:].view(np.int8)) * half(b, 0)


def _iq4_nl(data: Array) -> Array:
    b = data.reshape(-1, 18)
    return half(b, 0) * IQ4_VALUES[_nibbles(b, 2)]


def _mxfp4(data: Array) -> Array:
    b = data.reshape(-1, 17)
    return e8m0(b[:, :1]) * E2M1[_nibbles(b, 1)]


def _nvfp4(data: Array) -> Array:
    b = data.reshape(-1, 36)
    return E2M1[bits_of(b[:, 4:], 4, 8)] * _spread(_ue4m3(b[:, :4]), 16)


def _q1_0(data: Array) -> Array:
    b = data.reshape(-1, 18)
    d = half(b, 0)
    return np.where(np.unpackbits(b[:, 2:], axis=1, bitorder="little") > 0, d, -d)


def _q2_0(data: Array) -> Array:
    b = data.reshape(-1, 18)
    return (_f32(bits_of(b[:, 2:], 2, 1)) - np.float32(1)) * half(b, 0)


def _q2_k(data: Array) -> Array:
    b = data.reshape(-1, 84)
    scales, minima = half(b, 80) * _f32(b[:, :16] & 15), half(b, 82) * _f32(b[:, :16] >> 4)
    return _spread(scales, 16) * _f32(bits_of(b[:, 16:80], 2, 32)) - _spread(minima, 16)


def _q3_k(data: Array) -> Array:
    b = data.reshape(-1, 110)
    q = bits_of(b[:, 32:96], 2, 32) | bits_of(b[:, :32], 1, 32) << 2
    scales = half(b, 108) * (_f32(q3_scales(b[:, 96:108])) - np.float32(32))
    return _spread(scales, 16) * (_f32(q) - np.float32(4))


def _k4(b: Array, q: Array) -> Array:
    s, m = k4_scales(b[:, 4:16])
    return _spread(half(b, 0) * _f32(s), 32) * _f32(q) - _spread(half(b, 2) * _f32(m), 32)


def _q4_k(data: Array) -> Array:
    b = data.reshape(-1, 144)
    return _k4(b, bits_of(b[:, 16:], 4, 32))


def _q5_k(data: Array) -> Array:
    b = data.reshape(-1, 176)
    return _k4(b, bits_of(b[:, 48:], 4, 32) | bits_of(b[:, 16:48], 1, 32) << 4)


def _q6_k(data: Array) -> Array:
    b = data.reshape(-1, 210)
    q = bits_of(b[:, :128], 4, 64) | bits_of(b[:, 128:192], 2, 32) << 4
    scales = half(b, 208) * _f32(b[:, 192:208].view(np.int8))
    return _spread(scales, 16) * (_f32(q) - np.float32(32))


def _q8_k(data: Array) -> Array:
    b = data.reshape(-1, 292)
    return b[:, :4].copy().view("<f4") * _f32(b[:, 4:260].view(np.int8))


def _iq4_xs(data: Array) -> Array:
    b = data.reshape(-1, 136)
    scales = bits_of(b[:, 4:8], 4, 1) | bits_of(b[:, 2:4], 2, 1) << 4
    values = IQ4_VALUES[bits_of(b[:, 8:], 4, 16)]
    return _spread(half(b, 0) * (_f32(scales) - np.float32(32)), 32) * values


def _trits(data: Array, digits: int) -> Array:
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:digits, None]
    rest = data[:, None, :] * powers
    return (rest.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(data), -1)


def _tq1_0(data: Array) -> Array:
    b = data.reshape(-1, 54)
    q = np.concatenate([_trits(b[:, :32], 5), _trits(b[:, 32:48], 5), _trits(b[:, 48:52], 4)], axis=1)
    return (_f32(q) - np.float32(1)) * half(b, 52)


def _tq2_0(data: Array) -> Array:
    b = data.reshape(-1, 66)
    return (_f32(bits_of(b[:, :64], 2, 32)) - np.float32(1)) * half(b, 64)


# ---- codebooks -----------------------------------------------------------------------------------------


@cache
def _grid(name: str) -> Array:
    """(entries, 4 or 8) values."""
    numbers = np.frombuffer(zlib.decompress(base64.b85decode(PACKED)), "<u2")
    names = list(SIZES)
    first = sum(SIZES[n] for n in names[: names.index(name)])
    entries = numbers[first : first + SIZES[name], None].astype(np.int64)
    if name.startswith("iq3"):
        values = {"iq3_s": [1, 3, 5, 7, 9, 11, 13, 15], "iq3_xxs": [4, 12, 20, 28, 36, 44, 52, 62]}[name]
        return np.array(values, np.float32)[entries >> 3 * np.arange(4) & 7]
    values = [-1, 0, 1, 0] if name == "iq1" else [8, 25, 43, 0]
    return np.array(values, np.float32)[entries >> 2 * np.arange(8) & 3]


def _signed(values: Array, signs: Array) -> Array:
    """``values`` negated where the bits of ``signs`` (one byte per eight) are set."""
    bits = np.unpackbits(signs, axis=1, bitorder="little").reshape(values.shape)
    return np.where(bits > 0, -values, values)


def _even(seven: Array) -> Array:
    """Eight signs of seven bits: the eighth makes the number of minus signs even."""
    s = (seven & 127).astype(np.uint8)
    parity = s ^ s >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    return s | (parity & 1) << 7


def _signs_and_scale(data: Array) -> tuple[Array, Array]:
    """Eight words of 4 x 7 sign bits and a scale: (blocks, 32) signs, (blocks, 8) scales + 1/2."""
    words = np.ascontiguousarray(data).view("<u4").astype(np.uint32).reshape(-1, 8)
    seven = words[:, :, None] >> np.arange(0, 28, 7, dtype=np.uint32)
    return _even(seven).reshape(len(words), 32), np.float32(0.5) + _f32(words >> 28)


def _iq2_xxs(data: Array) -> Array:
    b = data.reshape(-1, 66)
    groups = b[:, 2:].reshape(-1, 8, 8)
    signs, scale = _signs_and_scale(groups[:, :, 4:])
    values = _grid("iq2_xxs")[groups[:, :, :4]].reshape(-1, 256)
    return _signed(_spread(half(b, 0) * scale * np.float32(0.25), 32) * values, signs)


def _half_scales(b: Array, scales: Array) -> Array:
    nibbles = np.float32(0.5) + _f32(bits_of(scales, 4, 1))
    return _spread(half(b, 0) * nibbles * np.float32(0.25), 16)


def _iq2_xs(data: Array) -> Array:
    b = data.reshape(-1, 74)
    q = np.ascontiguousarray(b[:, 2:66]).view("<u2").astype(np.uint16)
    values = _grid("iq2_xs")[q & 511].reshape(-1, 256)
    return _signed(_half_scales(b, b[:, 66:]) * values, _even(q >> 9))


def _iq2_s(data: Array) -> Array:
    b = data.reshape(-1, 82)
    index = b[:, 2:34].astype(np.uint16) | bits_of(b[:, 66:74], 2, 1).astype(np.uint16) << 8
    values = _grid("iq2_s")[index].reshape(-1, 256)
    return _signed(_half_scales(b, b[:, 74:]) * values, b[:, 34:66])


def _iq3_xxs(data: Array) -> Array:
    b = data.reshape(-1, 98)
    signs, scale = _signs_and_scale(b[:, 66:])
    values = _grid("iq3_xxs")[b[:, 2:66]].reshape(-1, 256)
    return _signed(_spread(half(b, 0) * scale * np.float32(0.5), 32) * values, signs)


def _iq3_s(data: Array) -> Array:
    b = data.reshape(-1, 110)
    ninth = np.unpackbits(b[:, 66:74], axis=1, bitorder="little").astype(np.uint16)
    values = _grid("iq3_s")[b[:, 2:66] | ninth << 8].reshape(-1, 256)
    scale = 1 + 2 * _f32(bits_of(b[:, 106:], 4, 1))
    return _signed(_spread(half(b, 0) * scale, 32) * values, b[:, 74:106])


def _iq1_s(data: Array) -> Array:
    b = data.reshape(-1, 50)
    high = np.ascontiguousarray(b[:, 34:]).view("<u2").astype(np.uint16)
    top = (high[:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7).reshape(-1, 32)
    shift = np.where(high & 0x8000, np.float32(-0.125), np.float32(0.125))
    scale = half(b, 0) * _f32(2 * (high >> 12 & 7) + 1)
    values = _grid("iq1")[b[:, 2:34] | top << 8].reshape(-1, 256)
    return _spread(scale, 32) * (values + _spread(shift, 32))


def _iq1_m(data: Array) -> Array:
    b = data.reshape(-1, 56)
    words = np.ascontiguousarray(b[:, 48:]).view("<u2").astype(np.uint16)
    d = (words >> 12 << np.arange(0, 16, 4, dtype=np.uint16)).sum(axis=1, dtype=np.uint16)[:, None]
    nibbles = bits_of(b[:, 32:48], 4, 1).astype(np.uint16)
    three = (words[:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7).reshape(-1, 16)
    scale = d.view("<f2").astype(np.float32) * _f32(2 * three + 1)
    shift = np.where(nibbles & 8, np.float32(-0.125), np.float32(0.125))
    values = _grid("iq1")[b[:, :32] | (nibbles & 7) << 8].reshape(-1, 256)
    return _spread(scale, 16) * (values + _spread(shift, 8))


DECODERS: dict[str, Callable[[Array], Array]] = {
    "f32": lambda data: data.view("<f4").astype(np.float32),
    "f16": lambda data: data.view("<f2").astype(np.float32),
    "bf16": lambda data: (data.view("<u2").astype(np.uint32) << 16).view(np.float32),
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "q8_k": _q8_k,
    "iq1_s": _iq1_s,
    "iq1_m": _iq1_m,
    "iq2_xxs": _iq2_xxs,
    "iq2_xs": _iq2_xs,
    "iq2_s": _iq2_s,
    "iq3_xxs": _iq3_xxs,
    "iq3_s": _iq3_s,
    "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs,
    "tq1_0": _tq1_0,
    "tq2_0": _tq2_0,
    "mxfp4": _mxfp4,
    "nvfp4": _nvfp4,
    "q1_0": _q1_0,
    "q2_0": _q2_0,
}
