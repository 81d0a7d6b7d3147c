"""QuantEmbedding: ``nn.Embedding`` on 4-bit (or other GGUF) rows."""

from __future__ import annotations

import torch
from torch import nn

from azquant.errors import ArgumentError, ShapeError
from azquant.tensor import QTensor
from azquant.torch.functional import embedding
from azquant.torch.linear import quantized_weight
from azquant.torch.packed import PackedModule
from azquant.types import GGMLType

__all__ = ["QuantEmbedding"]


class QuantEmbedding(PackedModule):
    """A table (num_embeddings, embedding_dim) in a ggml type; the rows asked for are dequantized.

    The result's dtype is ``dtype``, which follows ``.to()``, ``.half()`` and their like. The rows are frozen.
    A new table is zero.

    Raises ShapeError when ``embedding_dim`` is no whole number of blocks, UnsupportedTypeError.
    """

    like: torch.Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        type: str | GGMLType = "q4_0",
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, type)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.register_buffer("like", torch.empty(0, dtype=dtype, device="cpu"), persistent=False)

    @classmethod
    def from_embedding(
        cls, module: nn.Embedding, type: str | GGMLType = "q4_0", *, name: str = ""
    ) -> QuantEmbedding:
        """Quantizes an ``nn.Embedding``.

        Raises NonFiniteError, ShapeError, ArgumentError (max_norm is set; no CPU tensor).
        """
        if module.max_norm is not None:
            raise ArgumentError(f"{name or 'embedding'}: max_norm rewrites rows, which quantized rows cannot")
        q = quantized_weight(module, type, name)
        made = cls.from_qtensor(q, padding_idx=module.padding_idx, dtype=module.weight.dtype)
        return made.train(module.training)

    @classmethod
    def from_qtensor(
        cls, q: QTensor, *, padding_idx: int | None = None, dtype: torch.dtype = torch.float32
    ) -> QuantEmbedding:
        """A table of the rows ``q``, whose bytes it packs; nothing is quantized anew."""
        if q.ndim != 2:
            raise ShapeError(f"an embedding has two dimensions, this tensor has shape {q.shape}")
        made = cls(q.shape[0], q.shape[1], padding_idx, q.type, dtype=dtype)
        made.set_bytes(q.data)
        return made

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """(...) of int32 or int64 -> (..., embedding_dim). Raises ArgumentError, DTypeError, ShapeError."""
        rows, columns = self._shape
        return embedding(indices, self.packed, self._type_id, rows, columns, self.like.dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, type={self.quant_type}"
