"""NumPy searches behind the K-quants and the importance matrix: csrc/kernels/search.h over columns.

Arrays are (n, groups): a column is a group of n weights, and sums run down it one element after the other, so
the float32 rounding is that of the C kernels and of ggml.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from azquant._fallback_decode import IQ4_VALUES

__all__ = [
    "fit_affine",
    "fit_descent",
    "fit_positive",
    "fit_symmetric",
    "fit_table",
    "nearest",
    "nearest_value",
    "total",
    "weigh",
]

Array = npt.NDArray[Any]  # float32, and int32 for codes

_ROUND = np.float32(12582912)
_EPSILON = np.float32(1e-15)
_ZERO = np.float32(0)


def nearest(x: Array) -> Array:
    """Nearest integer, halves to even, below 2^22; beyond it the same integers as the kernels."""
    rounded: Array = ((x + _ROUND).view(np.int32) & 0x7FFFFF) - 0x400000
    return rounded


def total(rows: Iterable[Array]) -> Array:
    """Sum in order."""
    result: Array | None = None
    for row in rows:
        result = row.copy() if result is None else result + row
    assert result is not None
    return result


def weigh(x: Array, importance: Array, spread: Array) -> Array:
    """importance * sqrt(spread + x^2)."""
    weights: Array = importance * np.sqrt(spread + x * x)
    return weights


def _codes(x: Array, inverse: Array, low: int, high: int) -> Array:
    return np.clip(nearest(inverse * x), low, high).astype(np.float32)


def _largest(x: Array) -> tuple[Array, Array]:
    """The first element whose magnitude is largest, with its sign; where it counts as zero."""
    at = np.abs(x).argmax(axis=0)[None]
    found = np.take_along_axis(x, at, axis=0)[0]
    return found, np.abs(found) < _EPSILON


def fit_symmetric(x: Array, w: Array, nmax: int) -> tuple[Array, Array]:
    """Scale and codes 0 .. 2 nmax - 1 with x ~ scale * (code - nmax)."""
    largest, none = _largest(x)
    wx = w * x
    scale = best = chosen = np.zeros_like(largest)
    for step in (0, *range(-9, 0), *range(1, 10)):
        inverse = -(np.float32(nmax) + np.float32(0.1) * np.float32(step)) / largest
        code = _codes(x, inverse, -nmax, nmax - 1)
        sumlx, suml2 = total(wx * code), total(w * code * code)
        better = suml2 != 0 if step == 0 else (suml2 > 0) & (sumlx * sumlx > best * suml2)
        ratio = sumlx / suml2
        scale, best = np.where(better, ratio, scale), np.where(better, ratio * sumlx, best)
        chosen = inverse if step == 0 else np.where(better, inverse, chosen)
    codes = np.clip(nearest(chosen * x), -nmax, nmax - 1) + nmax
    return np.where(none, _ZERO, scale), np.where(none, 0, codes)


def fit_descent(x: Array, nmax: int) -> tuple[Array, Array]:
    """As :func:`fit_symmetric` with w = x^2, by moving single codes."""
    largest, none = _largest(x)
    w = x * x
    code = _codes(x, np.float32(-nmax) / largest, -nmax, nmax - 1)
    sumlx, suml2 = total(w * x * code), total(w * code * code)
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            slx, sl2 = sumlx - w[i] * x[i] * code[i], suml2 - w[i] * code[i] * code[i]
            new = np.clip(nearest(x[i] * sl2 / slx), -nmax, nmax - 1).astype(np.float32)
            better = (slx > 0) & (new != code[i])
            slx, sl2 = slx + w[i] * x[i] * new, sl2 + w[i] * new * new
            better &= (sl2 > 0) & (slx * slx * suml2 > sumlx * sumlx * sl2)
            code[i] = np.where(better, new, code[i])
            sumlx, suml2 = np.where(better, slx, sumlx), np.where(better, sl2, suml2)
            changed = changed or bool(better.any())
        if not changed:
            break
    scale = np.where(none | ~(suml2 > 0), _ZERO, sumlx / suml2)
    return scale, np.where(none, 0, code.astype(np.int32) + nmax)


def fit_affine(
    x: Array, w: Array, nmax: int, first: float, delta: float, steps: int, *, absolute: bool = False
) -> tuple[Array, Array, Array]:
    """Scale, minimum and codes 0 .. nmax with x ~ scale * code - minimum."""
    top = np.float32(nmax)
    # Of zeros of both signs the first (argmin itself does not always take it).
    low: Array = np.take_along_axis(x, (x == x.min(axis=0)).argmax(axis=0)[None], axis=0)[0]
    high = x.max(axis=0)
    low = np.where(low > 0, _ZERO, low)
    lowest, flat = low, low == high
    sum_w, sum_x = total(w), total(w * x)

    def error(scale: Array, code: Array, minimum: Array) -> Array:
        diff = scale * code + minimum - x
        return total(w * (np.abs(diff) if absolute else diff * diff))

    inverse: Array = top / (high - low)
    scale: Array = np.float32(1) / inverse
    best = error(scale, _codes(x - low, inverse, 0, nmax), low)
    chosen, chosen_low = inverse, low
    for step in range(steps + 1):
        inverse = (np.float32(first) + np.float32(delta) * np.float32(step) + top) / (high - low)
        code = _codes(x - low, inverse, 0, nmax)
        wl = w * code
        sum_l, sum_l2, sum_xl = total(wl), total(wl * code), total(wl * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        fit = (sum_w * sum_xl - sum_x * sum_l) / determinant
        fit_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        positive = fit_low > 0
        fit, fit_low = np.where(positive, sum_xl / sum_l2, fit), np.where(positive, _ZERO, fit_low)
        now = error(fit, code, fit_low)
        better = (determinant > 0) & (now < best)
        best, scale = np.where(better, now, best), np.where(better, fit, scale)
        chosen, chosen_low = np.where(better, inverse, chosen), np.where(better, low, chosen_low)
        low = np.where(better, fit_low, low)
    codes = np.clip(nearest(chosen * (x - chosen_low)), 0, nmax)
    return np.where(flat, _ZERO, scale), -np.where(flat, lowest, low), np.where(flat, 0, codes)


def fit_positive(x: Array, w: Array, nmax: int) -> tuple[Array, Array]:
    """Scale and codes 0 .. nmax with x ~ scale * code, for scales and minima of super-blocks (x >= 0)."""
    top = np.float32(nmax)
    largest = np.maximum(x.max(axis=0), _ZERO)
    none = largest < _EPSILON

    def error(inverse: Array, code: Array) -> Array:
        diff = x - np.float32(1) / inverse * code.astype(np.float32)
        return total(w * diff * diff)

    inverse = top / largest
    best = error(inverse, nearest(inverse * x) & 255)
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        attempt = (np.float32(0.1) * np.float32(step) + top) / largest
        now = error(attempt, np.minimum(nearest(attempt * x), nmax))
        better = now < best
        best, inverse = np.where(better, now, best), np.where(better, attempt, inverse)
    code = np.minimum(nearest(inverse * x), nmax).astype(np.float32)
    sumlx, suml2 = total(w * x * code), total(w * code * code)
    code = (code.astype(np.int32) & 255).astype(np.float32)
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            slx, sl2 = sumlx - w[i] * x[i] * code[i], suml2 - w[i] * code[i] * code[i]
            better = (slx > 0) & (sl2 > 0)
            new = np.minimum(nearest(x[i] * sl2 / slx), nmax).astype(np.float32)
            slx, sl2 = slx + w[i] * x[i] * new, sl2 + w[i] * new * new
            better &= (new != code[i]) & (slx * slx * suml2 > sumlx * sumlx * sl2)
            code[i] = np.where(better, (new.astype(np.int32) & 255).astype(np.float32), code[i])
            sumlx, suml2 = np.where(better, slx, sumlx), np.where(better, sl2, suml2)
            changed = changed or bool(better.any())
        if not changed:
            break
    scale = np.where(none | ~(suml2 > 0), _ZERO, sumlx / suml2)
    return scale, np.where(none, 0, code.astype(np.int32))


_MIDDLES = (IQ4_VALUES[:-1] + IQ4_VALUES[1:]) * np.float32(0.5)


def nearest_value(x: Array) -> Array:
    """Codes of IQ4's table nearest to x: ties go up, NaN to the last."""
    return np.searchsorted(_MIDDLES, x, side="right")


def fit_table(x: Array, w: Array) -> Array:
    """Scale with x ~ scale * table[code] for IQ4's table."""
    largest, none = _largest(x)
    scale = best = np.zeros_like(largest)
    for step in range(-1, 15):
        if step < 0:
            inverse = np.float32(1) / (-largest / IQ4_VALUES[0])
        else:
            inverse = (np.float32(step - 7) + IQ4_VALUES[0]) / largest
        value = IQ4_VALUES[nearest_value(inverse * x)]
        wv = w * value
        sumqx, sumq2 = total(wv * x), total(wv * value)
        better = sumq2 > 0 if step < 0 else (sumq2 > 0) & (sumqx * sumqx > best * sumq2)
        ratio = sumqx / sumq2
        scale, best = np.where(better, ratio, scale), np.where(better, ratio * sumqx, best)
    return np.where(none, _ZERO, scale)
