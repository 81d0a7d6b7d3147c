"""How much of each type a set of tensors holds."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from azquant.gguf.reader import GGUFTensor

__all__ = ["type_totals"]


def type_totals(tensors: Mapping[str, GGUFTensor]) -> dict[str, dict[str, int]]:
    """By type name: ``tensors``, ``parameters`` and ``bytes``; the type with most bytes first."""
    totals: dict[str, dict[str, int]] = {}
    for tensor in tensors.values():
        total = totals.setdefault(tensor.type.name, {"tensors": 0, "parameters": 0, "bytes": 0})
        total["tensors"] += 1
        total["parameters"] += prod(tensor.shape)
        total["bytes"] += tensor.nbytes
    return dict(sorted(totals.items(), key=lambda item: -item[1]["bytes"]))
