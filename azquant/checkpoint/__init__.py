"""Checkpoints as training wrote them: safetensors and torch files, read lazily and without torch."""

from __future__ import annotations

from azquant.checkpoint.base import Checkpoint
from azquant.checkpoint.folder import open_checkpoint
from azquant.checkpoint.stacked import StackedTensor
from azquant.checkpoint.tensor import LazyTensor

__all__ = ["Checkpoint", "LazyTensor", "StackedTensor", "open_checkpoint"]
