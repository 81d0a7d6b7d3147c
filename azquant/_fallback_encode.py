"""NumPy quantizers: the bytes of ggml's reference, as the C kernels make them.

Each takes rows (rows, k) float32 and importances (k,) or ``None``, and gives the blocks' bytes. The layouts
stand in csrc/azq_blocks.h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from azquant._fallback_decode import E2M1, e8m0, k4_scales, q3_scales
from azquant._fallback_search import (
    fit_affine,
    fit_descent,
    fit_positive,
    fit_symmetric,
    fit_table,
    nearest,
    nearest_value,
    total,
    weigh,
)

__all__ = ["ENCODERS", "SCALES_AT", "TOO_LARGE"]

Array = npt.NDArray[Any]  # uint8 for bytes and codes, float32 for values, int32 for codes under way
Encoder = Callable[[Array, "Array | None"], Array]

SUPER = 256
_ZERO = np.float32(0)

SCALES_AT = {
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q8_0": (0,),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
    "iq4_nl": (0,),
    "iq4_xs": (0,),
    "tq1_0": (52,),
    "tq2_0": (64,),
}
"""Where the fp16 scales of a block lie, which must not overflow."""

TOO_LARGE = 1e9
"""No block with an fp16 scale holds a number of this size; searches might overflow beyond it."""


def _f16(x: Array) -> Array:
    """(blocks,) -> (blocks, 2) bytes."""
    return x.astype("<f2").reshape(-1, 1).view(np.uint8)


def _read(d: Array) -> Array:
    """What those bytes will be read as: (blocks, 1)."""
    return np.ascontiguousarray(d).view("<f2").astype(np.float32)


def _low_byte(t: Array) -> Array:
    """float -> int8 as C on x86 does it: truncation, and 0 where the number fits no int32."""
    fits = (t > -2147483648.0) & (t < 2147483648.0)
    return np.where(fits, t, 0).astype(np.int32).astype(np.int8)


def _inverse(d: Array) -> Array:
    return np.divide(1.0, d, out=np.zeros_like(d), where=d != 0)


def _pack(q: Array, width: int, order: int) -> Array:
    """The inverse of bits_of: (blocks, n) fields -> bytes."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    runs = q.reshape(len(q), -1, 8 // width, order).astype(np.uint8) << shifts
    return np.bitwise_or.reduce(runs, axis=2).reshape(len(q), -1)


def _nibbles(q: Array) -> Array:
    return _pack(q & 15, 4, 16)


def _fifth(q: Array) -> Array:
    return np.packbits(q >> 4 & 1, axis=1, bitorder="little")


def _join(*parts: Array) -> Array:
    return np.concatenate(parts, axis=1)


# ---- without a search ------------------------------------------------------------------------------------


def _extreme(blocks: Array) -> Array:
    at = np.abs(blocks).argmax(axis=1)[:, None]  # the first one, as the reference takes it
    largest = np.take_along_axis(blocks, at, axis=1)
    return np.where(largest == 0, _ZERO, largest)  # never -0


def _plain_q4_0(x: Array) -> Array:
    blocks = x.reshape(-1, 32)
    d = _extreme(blocks) / np.float32(-8)
    return _join(_f16(d), _nibbles(np.minimum(_low_byte(blocks * _inverse(d) + np.float32(8.5)), 15)))


def _plain_q5_0(x: Array) -> Array:
    blocks = x.reshape(-1, 32)
    d = _extreme(blocks) / np.float32(-16)
    q = np.minimum(_low_byte(blocks * _inverse(d) + np.float32(16.5)), 31)
    return _join(_f16(d), _fifth(q), _nibbles(q))


def _offset(x: Array, levels: int) -> tuple[Array, Array, Array]:
    blocks = x.reshape(-1, 32)
    # Of zeros of both signs the first counts (argmin itself does not always take it).
    low, high = (
        np.take_along_axis(blocks, (blocks == bound(axis=1, keepdims=True)).argmax(axis=1)[:, None], axis=1)
        for bound in (blocks.min, blocks.max)
    )
    d = (high - low) / np.float32(levels)
    return d, low, _low_byte((blocks - low) * _inverse(d) + np.float32(0.5))


def _plain_q4_1(x: Array) -> Array:
    d, low, q = _offset(x, 15)
    return _join(_f16(d), _f16(low), _nibbles(np.minimum(q, 15)))


def _plain_q5_1(x: Array) -> Array:
    d, low, q = _offset(x, 31)
    return _join(_f16(d), _f16(low), _fifth(q), _nibbles(q))


def _q8_0(x: Array, importance: Array | None) -> Array:
    blocks = x.reshape(-1, 32)
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    t = blocks * _inverse(d)
    # Half away from zero: add the float just below 0.5 with the sign of t, then truncate.
    q = _low_byte(t + np.copysign(np.float32(0.49999997), t))
    return _join(_f16(d), q.view(np.uint8))


def _mxfp4(x: Array, importance: Array | None) -> Array:
    blocks = x.reshape(-1, 32)
    amax = np.abs(blocks).max(axis=1, keepdims=True)
    # log2 in float64, rounded once: see csrc/kernels/encode.h.
    exponent = np.floor(np.log2(amax.astype(np.float64)).astype(np.float32)) + np.float32(125)
    e = (np.where(amax > 0, exponent, 0).astype(np.int32) & 255).astype(np.uint8)
    values = (E2M1 * e8m0(e))[:, None, :]
    return _join(e, _nibbles(np.abs(values - blocks[:, :, None]).argmin(axis=2).astype(np.uint8)))


def _trits(x: Array) -> tuple[Array, Array]:
    blocks = x.reshape(-1, SUPER)
    d = np.abs(blocks).max(axis=1, keepdims=True)
    scaled = blocks * _inverse(d)
    whole = np.trunc(scaled + np.copysign(np.float32(0.49999997), scaled))
    return d, np.where(np.abs(scaled) < 4, whole + 1, 1).astype(np.uint8)


def _tq1_0(x: Array, importance: Array | None) -> Array:
    d, t = _trits(x)

    def packed(digits: Array, order: int) -> Array:
        runs = digits.reshape(len(digits), -1, order).astype(np.int32)
        powers = np.array([81, 27, 9, 3, 1], np.int32)[: runs.shape[1], None]
        return (((runs * powers).sum(axis=1) * 256 + 242) // 243).astype(np.uint8)

    return _join(packed(t[:, :160], 32), packed(t[:, 160:240], 16), packed(t[:, 240:], 4), _f16(d))


def _tq2_0(x: Array, importance: Array | None) -> Array:
    d, t = _trits(x)
    return _join(_pack(t & 3, 2, 32), _f16(d))


# ---- blocks of 32 with a search ---------------------------------------------------------------------------


def _columns(x: Array, n: int) -> Array:
    """(rows, k) -> (n, groups)."""
    return np.ascontiguousarray(x.reshape(-1, n).T)


def _weights(x: Array, importance: Array, over: int, factor: float = 1.0) -> Array:
    """importance * sqrt(spread + x^2), spread: factor * mean square over runs of ``over`` elements."""
    spread = np.float32(factor) * total(_columns(x, over) ** 2) / np.float32(over)
    wide = np.broadcast_to(importance, x.shape).reshape(-1, over)
    return weigh(x.reshape(-1, over), wide, spread[:, None]).reshape(x.shape)


def _symmetric(nmax: int, plain: Callable[[Array], Array]) -> Encoder:
    """Q4_0 and Q5_0: ``plain`` without importance."""

    def encode(x: Array, importance: Array | None) -> Array:
        if importance is None:
            return plain(x)
        scale, codes = fit_symmetric(_columns(x, 32), _columns(_weights(x, importance, x.shape[1]), 32), nmax)
        q = codes.T.astype(np.uint8)
        return _join(_f16(scale), *([_fifth(q)] if nmax > 8 else []), _nibbles(q))

    return encode


def _affine(nmax: int, plain: Callable[[Array], Array]) -> Encoder:
    """Q4_1 and Q5_1."""

    def encode(x: Array, importance: Array | None) -> Array:
        if importance is None:
            return plain(x)
        weights = _columns(_weights(x, importance, x.shape[1]), 32)
        scale, minimum, codes = fit_affine(_columns(x, 32), weights, nmax, -0.9, 0.05, 36)
        q = codes.T.astype(np.uint8)
        return _join(_f16(scale), _f16(-minimum), *([_fifth(q)] if nmax > 15 else []), _nibbles(q))

    return encode


# ---- super-blocks -----------------------------------------------------------------------------------------


def _recode(x: Array, d: Array, m: Array, low: int, high: int, searched: Array) -> Array:
    """Codes again with what will be read back; (blocks, groups, n). A zero scale keeps those searched."""
    again = np.clip(nearest((x + m[:, :, None]) / d[:, :, None]), low, high)
    return np.where(d[:, :, None] != 0, again, searched)


def _rounded(x: Array, top: int) -> tuple[Array, Array]:
    """(blocks, groups) -> what one step of the blocks' scales is worth, and the scales in such steps."""
    largest = np.maximum(x.max(axis=1), _ZERO)
    inverse = np.where(largest > 0, np.float32(top) / largest, _ZERO)
    return largest / np.float32(top), nearest(inverse[:, None] * x) & 255


def _searched(
    x: Array, w: Array, n: int, nmax: int, first: float, delta: float, steps: int, *, absolute: bool = False
) -> tuple[Array, Array, Array, Array]:
    """Scales, minima and sums of weights (blocks, groups), codes (blocks, groups, n)."""
    weights = _columns(w, n)
    scale, minimum, q = fit_affine(_columns(x, n), weights, nmax, first, delta, steps, absolute=absolute)
    scales, minima, sums = (a.reshape(-1, SUPER // n) for a in (scale, minimum, total(weights)))
    return scales, minima, sums, np.ascontiguousarray(q.T).reshape(-1, SUPER // n, n)


def _fit_scales(scale: Array, minimum: Array, weight: Array, top: int) -> tuple[Array, Array, Array, Array]:
    w = np.ascontiguousarray(weight.T)
    d, s = fit_positive(np.ascontiguousarray(scale.T), w, top)
    dmin, m = fit_positive(np.ascontiguousarray(minimum.T), w, top)
    return d, s.T, dmin, m.T


def _q2_k(x: Array, importance: Array | None) -> Array:
    if importance is None:
        scale, minimum, _, q = _searched(x, np.abs(x), 16, 3, -0.5, 0.1, 15, absolute=True)
        (d, s), (dmin, m) = _rounded(scale, 15), _rounded(minimum, 15)
    else:
        scale, minimum, weight, q = _searched(x, _weights(x, importance, SUPER), 16, 3, -0.9, 0.05, 36)
        d, s, dmin, m = _fit_scales(scale, minimum, weight, 15)
    packed = (s | m << 4).astype(np.uint8)
    of_d, of_min = _f16(d), _f16(dmin)
    step, low = _read(of_d) * (packed & 15).astype("f4"), _read(of_min) * (packed >> 4).astype("f4")
    q = _recode(x.reshape(-1, 16, 16), step, low, 0, 3, q)
    return _join(packed, _pack(q.reshape(-1, SUPER), 2, 32), of_d, of_min)


def _k4(x: Array, importance: Array | None, nmax: int, first: float, steps: int) -> tuple[Array, Array]:
    """Q4_K and Q5_K: the first 16 bytes of each block, and the codes (blocks, 256)."""
    if importance is None:
        mean = np.sqrt(total(_columns(x, 32) ** 2) / np.float32(32))
        w = (mean[:, None] + np.abs(x.reshape(-1, 32))).reshape(x.shape)
        scale, minimum, _, q = _searched(x, w, 32, nmax, first, 0.1, steps)
        (d, s), (dmin, m) = _rounded(scale, 63), _rounded(minimum, 63)
        s, m = np.minimum(s, 63), np.minimum(m, 63)
    else:
        w = _weights(x, importance, SUPER, 2.0)
        scale, minimum, weight, q = _searched(x, w, 32, nmax, -0.9, 0.05, 36)
        d, s, dmin, m = _fit_scales(scale, minimum, weight, 63)
    s, m = s.astype(np.uint8), m.astype(np.uint8)
    packed = _join(
        s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6, s[:, 4:] & 15 | (m[:, 4:] & 15) << 4
    )
    of_d, of_min = _f16(d), _f16(dmin)
    s, m = k4_scales(packed)
    step, low = _read(of_d) * s.astype("f4"), _read(of_min) * m.astype("f4")
    q = _recode(x.reshape(-1, 8, 32), step, low, 0, nmax, q)
    return _join(of_d, of_min, packed), q.reshape(-1, SUPER)


def _q4_k(x: Array, importance: Array | None) -> Array:
    head, q = _k4(x, importance, 15, -1.0, 20)
    return _join(head, _pack(q, 4, 32))


def _q5_k(x: Array, importance: Array | None) -> Array:
    head, q = _k4(x, importance, 31, -0.5, 15)
    return _join(head, _pack(q >> 4, 1, 32), _pack(q & 15, 4, 32))


def _strongest(scale: Array) -> Array:
    """(blocks, groups) -> (blocks, 1): the first of largest magnitude, with its sign."""
    found: Array = np.take_along_axis(scale, np.abs(scale).argmax(axis=1)[:, None], axis=1)
    return found


def _recode_16(x: Array, of_d: Array, s: Array, nmax: int, searched: Array) -> Array:
    """Codes 0 .. 2 nmax - 1 of Q3_K and Q6_K, (blocks, 256)."""
    step = _read(of_d) * s.astype("f4")
    codes = np.ascontiguousarray(searched.T).reshape(-1, 16, 16) - nmax
    again = _recode(x.reshape(-1, 16, 16), step, np.zeros_like(step), -nmax, nmax - 1, codes)
    return (again + nmax).reshape(-1, SUPER)


def _q3_k(x: Array, importance: Array | None) -> Array:
    if importance is None:
        found, q = fit_descent(_columns(x, 16), 4)
        scale = found.reshape(-1, 16)
        largest = _strongest(scale)
        inverse = np.float32(-32) / largest
        steps = np.clip((nearest(inverse * scale) & 255).astype(np.uint8).view(np.int8), -32, 31)
        s = np.where(largest != 0, steps.astype(np.int32) + 32, 0)
        d = np.where(largest != 0, np.float32(1) / inverse, _ZERO)
    else:
        w = _columns(_weights(x, importance, SUPER, 2.0), 16)
        found, q = fit_symmetric(_columns(x, 16), w, 4)
        scales, weights = found.reshape(-1, 16).T, total(w).reshape(-1, 16).T
        d, codes = fit_symmetric(np.ascontiguousarray(scales), np.ascontiguousarray(weights), 32)
        s = np.ascontiguousarray(codes.T)
    packed = _join(_pack(s & 15, 4, 8), _pack(s >> 4, 2, 4))
    of_d = _f16(d)
    bits = _recode_16(x, of_d, q3_scales(packed).astype(np.int32) - 32, 4, q)
    return _join(_pack(bits >> 2, 1, 32), _pack(bits & 3, 2, 32), packed, of_d)


def _q6_k(x: Array, importance: Array | None) -> Array:
    w = x * x if importance is None else np.ascontiguousarray(np.broadcast_to(importance, x.shape))
    found, q = fit_symmetric(_columns(x, 16), _columns(w, 16), 32)
    scale = found.reshape(-1, 16)
    largest = _strongest(scale)
    inverse = np.float32(-128) / largest
    of_d = _f16(np.float32(1) / inverse)
    s = (np.minimum(nearest(inverse * scale), 127) & 255).astype(np.uint8)
    bits = _recode_16(x, of_d, s.view(np.int8), 32, q)
    out = _join(_pack(bits & 15, 4, 64), _pack(bits >> 4, 2, 32), s, of_d)
    out[np.abs(largest[:, 0]) < np.float32(1e-15)] = 0
    return out


def _iq4_scales(x: Array, importance: Array | None, over: int) -> Array:
    w = x * x if importance is None else _weights(x, importance, over, 2.0)
    return fit_table(_columns(x, 32), _columns(w, 32))


def _iq4_nl(x: Array, importance: Array | None) -> Array:
    scale = _iq4_scales(x, importance, 32)
    return _join(_f16(scale), _nibbles(nearest_value(_inverse(scale)[:, None] * x.reshape(-1, 32))))


def _iq4_xs(x: Array, importance: Array | None) -> Array:
    scale = _iq4_scales(x, importance, SUPER).reshape(-1, 8)
    d = -_strongest(scale) / np.float32(32)
    s = np.clip(nearest(_inverse(d) * scale), -32, 31)
    step = d * s.astype(np.float32)
    q = nearest_value(_inverse(step)[:, :, None] * x.reshape(-1, 8, 32)).reshape(-1, SUPER)
    return _join(_f16(d), _pack(s + 32 >> 4, 2, 1), _pack(s + 32 & 15, 4, 1), _pack(q, 4, 16))


def _cast(dtype: str) -> Encoder:
    return lambda x, importance: x.astype(dtype).view(np.uint8)


def _bf16(x: Array, importance: Array | None) -> Array:
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").view(np.uint8)


ENCODERS: dict[str, Encoder] = {
    "f32": _cast("<f4"),
    "f16": _cast("<f2"),
    "bf16": _bf16,
    "q4_0": _symmetric(8, _plain_q4_0),
    "q4_1": _affine(15, _plain_q4_1),
    "q5_0": _symmetric(16, _plain_q5_0),
    "q5_1": _affine(31, _plain_q5_1),
    "q8_0": _q8_0,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs,
    "mxfp4": _mxfp4,
    "tq1_0": _tq1_0,
    "tq2_0": _tq2_0,
}
