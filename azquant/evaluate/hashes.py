"""Hashes of tensors, to tell whether two files hold the same."""

from __future__ import annotations

import hashlib

from azquant.gguf import GGUFTensor

__all__ = ["tensor_sha256"]

_PIECE = 1 << 24


def tensor_sha256(tensor: GGUFTensor) -> str:
    """SHA-256 of the bytes that the tensor has in its file (padding apart), in hexadecimal.

    What ``tail -c +OFFSET+1 FILE | head -c NBYTES | sha256sum`` prints. Raises GGUFError for a header-only
    file.
    """
    digest = hashlib.sha256()
    raw = tensor.raw.data
    for at in range(0, raw.nbytes, _PIECE):
        digest.update(raw[at : at + _PIECE])
    return digest.hexdigest()
