"""RoPE settings of a Hugging Face config: base, linear scaling, and the llama3 frequency divisors."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from azquant._lazy import np
from azquant.architectures.fields import Fields

if TYPE_CHECKING:
    from azquant.program import Floats

__all__ = ["FLAT_KEYS", "Rope", "frequencies", "hf_rope", "hf_rope_section"]

FLAT_KEYS = ("rope_theta", "partial_rotary_factor")
"""What the base and the share of each head that turns are called beside ``rope_scaling``."""


@dataclass(frozen=True)
class Rope:
    """How positions turn the heads of a model."""

    base: float = 10000.0
    """Pair i of d/2 turns by position · base^(-2i/d)."""
    scale: float = 1.0
    """Positions are divided by this (linear scaling)."""
    divisors: tuple[float, ...] = ()
    """What each pair's frequency is divided by; empty for none. In GGUF, ``rope_freqs.weight``."""


def frequencies(rope: Rope, dimension: int, divisors: Floats | None = None) -> Floats:
    """Radians per position of each of the ``dimension / 2`` rotated pairs."""
    if divisors is None:
        with suppress(OverflowError):  # NumPy has infinity for it
            return array(
                "f", [rope.base ** (-pair / dimension) / rope.scale for pair in range(0, dimension, 2)]
            )
    pairs = np.arange(0, dimension, 2, dtype=np.float64)
    turns = rope.base ** (-pairs / dimension) / rope.scale
    return (turns if divisors is None else turns / divisors).astype(np.float32)


def hf_rope_section(fields: Fields) -> Fields | None:
    """What a config says of RoPE in one place: ``rope_scaling``, else transformers 5's ``rope_parameters``.

    Where both stand, as in configs written for both versions, transformers takes the first.
    """
    found = fields.section("rope_scaling")
    return found if found is not None and found.values else fields.section("rope_parameters")


def hf_rope(
    fields: Fields,
    head_dim: int,
    kinds: Sequence[str] = ("default", "linear"),
    *,
    partial: bool = False,
    default_base: float = 10000.0,
    flat_keys: tuple[str, str] = FLAT_KEYS,
) -> Rope:
    """The RoPE of a config whose heads turn ``head_dim`` elements. ``kinds``: the scalings GGUF has for it.

    Raises ConversionError for other kinds, and, unless ``partial``, for heads that turn in part.
    transformers 5 gathers everything in ``rope_parameters``; before, ``rope_theta`` stood beside
    ``rope_scaling``, under names of which some architectures have their own: ``flat_keys``.
    """
    rope = hf_rope_section(fields) or fields
    base = fields.number(flat_keys[0], default=default_base)
    if rope is not fields:
        base = rope.number("rope_theta", default=base)
    for part in (rope, fields):
        if not partial and part.number("partial_rotary_factor", default=1.0) != 1.0:
            part.fail(
                "partial_rotary_factor is not 1, but GGUF's graph of this architecture turns whole heads"
            )
    kind = "default" if rope is fields else rope.text("rope_type", "type", default="default")
    if kind not in kinds:
        rope.fail(f"RoPE scaling of type {kind!r} is not supported; known are {', '.join(kinds)}")
    if kind == "linear":
        return Rope(base, scale=rope.number("factor"))
    if kind == "llama3":
        return Rope(base, divisors=_llama3_divisors(rope, base, head_dim))
    return Rope(base)


def _llama3_divisors(rope: Fields, base: float, head_dim: int) -> tuple[float, ...]:
    """Llama 3.1's rule: 1 for short wavelengths, ``factor`` for long ones, blended in frequency between."""
    factor = rope.number("factor")
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    original = rope.integer("original_max_position_embeddings")
    if low >= high:
        rope.fail(f"low_freq_factor {low} is not below high_freq_factor {high}")
    divisors = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * base ** (2 * i / head_dim)
        blend = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        divisors.append(1 / ((1 - blend) / factor + blend))
    return tuple(divisors)
