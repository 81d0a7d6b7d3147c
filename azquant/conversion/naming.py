"""File names by the GGUF naming convention: ``az-llm-134M-v1.0-Q4_0.gguf``.

Source: docs/gguf.md of ggml, "GGUF Naming Convention":
``<BaseName>-<SizeLabel>-<FineTune>-<Version>-<Encoding>-<Type>-<Shard>.gguf``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from azquant.conversion.recipe import Target
from azquant.errors import ArgumentError
from azquant.gguf import MetadataValue, keys

__all__ = ["check_version", "default_file_name", "output_path"]

DEFAULT_VERSION = "v1.0"  # what the convention says to assume

_VERSION = re.compile(r"v?(\d+(?:\.\d+)*)", re.IGNORECASE)


def check_version(version: str) -> str:
    """``version`` as the convention writes it (``v1.1``, also from ``1.1``). Raises ArgumentError."""
    match = _VERSION.fullmatch(version.strip())
    if match is None:
        raise ArgumentError(f"version {version!r:.60} is none: it must be numbers with dots, as in v1.1")
    return f"v{match[1]}"


def default_file_name(metadata: Mapping[str, MetadataValue], target: Target) -> str:
    """The name of a file with these ``general.*`` keys."""

    def part(key: str, default: str = "") -> str:
        value = metadata.get(key)
        text = str(value.value) if value is not None else default
        return re.sub(r"[^\w.+-]+", "-", text).strip("-.")

    parts = (
        part(keys.BASENAME) or part(keys.NAME) or "model",
        part(keys.SIZE_LABEL),
        part(keys.FINETUNE),
        part(keys.VERSION, DEFAULT_VERSION),
        target.name.upper(),
    )
    return "-".join(filter(None, parts)) + ".gguf"


def output_path(destination: Path | None, metadata: Mapping[str, MetadataValue], target: Target) -> Path:
    """``destination``, or in the folder it is (the current one for None) a file of the default name."""
    if destination is None or destination.is_dir():
        return (destination or Path()) / default_file_name(metadata, target)
    return destination
