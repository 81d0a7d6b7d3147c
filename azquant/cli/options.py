"""Option values that several verbs read alike."""

from __future__ import annotations

import re

import click

__all__ = ["size_option"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def size_option(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """``500M`` or ``2G``: decimal units, as llama.cpp counts them too."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d{1,12})([kmg]?)b?", value.lower())
    if found is None or not int(found[1]):
        raise click.BadParameter(f"{value!r} is no size; write 500M or 2G", context, option)
    return int(found[1]) * _UNITS[found[2]]
