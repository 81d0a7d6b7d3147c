"""QuantLinear: ``nn.Linear`` on 4-bit (or other GGUF) weights."""

from __future__ import annotations

import torch
from torch import nn

from azquant.errors import ArgumentError, DTypeError, ShapeError
from azquant.ops import COMPUTE_MODES, encode_rows
from azquant.tensor import QTensor
from azquant.torch.functional import linear
from azquant.torch.packed import PackedModule
from azquant.types import GGMLType, get_type

__all__ = ["QuantLinear", "dense_weight", "is_conv1d", "quantized_weight"]


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, GPT-2's linear layer, whose weight is (in, out)."""
    kind = module.__class__
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def quantized_weight(module: nn.Module, type: str | GGMLType, name: str = "") -> QTensor:
    """The weight of a linear or embedding layer, quantized as (out, in).

    Raises ArgumentError when it is on another device or has no data, ShapeError, NonFiniteError.
    """
    found = get_type(type)
    dense = dense_weight(module, name).numpy()
    data = encode_rows(dense, found, tensor=f"{name}.weight" if name else None)
    return QTensor(data, dense.shape, found)


def dense_weight(module: nn.Module, name: str = "") -> torch.Tensor:
    """The weight of a linear or embedding layer as float32 (out, in), on the CPU, contiguous."""
    weight = module.weight
    where = name or module.__class__.__name__
    assert isinstance(weight, torch.Tensor)
    if weight.device.type == "meta":
        raise ArgumentError(
            f"{where}: the weight is on the meta device: load its values before quantizing it"
        )
    if weight.device.type != "cpu":
        raise ArgumentError(
            f"{where}: the weight is on {weight.device}, but azquant quantizes on the CPU: "
            "move the model with .cpu()"
        )
    if not weight.is_floating_point():
        raise DTypeError(f"{where}: the weight is {weight.dtype}, not floating point")
    dense = weight.detach().to(torch.float32)
    return (dense.T if is_conv1d(module) else dense).contiguous()


class QuantLinear(PackedModule):
    """``y = x Wᵀ + bias`` with W (out_features, in_features) in a ggml type; input (..., in_features).

    float32, bfloat16 and float16 inputs; the result has the input's dtype and is computed in float32.
    ``compute`` is as in :func:`azquant.matmul`; ``"fp32"`` is the accuracy reference. The weight is frozen:
    gradients flow to the input and the bias. A new layer's weight is zero.

    Raises ShapeError when ``in_features`` is no whole number of blocks, UnsupportedTypeError, ArgumentError.
    """

    bias: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        type: str | GGMLType = "q4_0",
        *,
        compute: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features, type)
        if compute not in COMPUTE_MODES:
            raise ArgumentError(f"compute={compute!r}: must be one of {', '.join(COMPUTE_MODES)}")
        self.in_features, self.out_features, self.compute = in_features, out_features, compute
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device="cpu"))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_linear(
        cls, module: nn.Module, type: str | GGMLType = "q4_0", *, compute: str = "auto", name: str = ""
    ) -> QuantLinear:
        """Quantizes an ``nn.Linear`` or a transformers ``Conv1D``; the bias is the same parameter.

        ``name`` is for messages. Raises NonFiniteError, ShapeError, ArgumentError (no CPU tensor).
        """
        q = quantized_weight(module, type, name)
        bias = getattr(module, "bias", None)
        made = cls.from_qtensor(q, bias if isinstance(bias, torch.Tensor) else None, compute=compute)
        return made.train(module.training)

    @classmethod
    def from_qtensor(
        cls, q: QTensor, bias: torch.Tensor | None = None, *, compute: str = "auto"
    ) -> QuantLinear:
        """A layer of the weights ``q`` (out, in), whose bytes it packs; nothing is quantized anew.

        ``bias`` (out,) becomes the layer's parameter, or stays it where it is one.
        """
        if q.ndim != 2:
            raise ShapeError(f"a linear layer's weight has two dimensions, this tensor has shape {q.shape}")
        made = cls(q.shape[1], q.shape[0], False, q.type, compute=compute)
        made.set_bytes(q.data)
        if bias is not None:
            if tuple(bias.shape) != (q.shape[0],):
                raise ShapeError(
                    f"the bias has shape {tuple(bias.shape)}, the weight {q.shape} needs ({q.shape[0]},)"
                )
            if bias.device.type != "cpu":
                raise ArgumentError(f"azquant computes on the CPU, but the bias is on {bias.device}")
            made.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach().clone())
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features). Raises ArgumentError, DTypeError, ShapeError."""
        if x.shape[-1:] != (self.in_features,):
            raise ShapeError(
                f"the input has shape {tuple(x.shape)}, this layer needs (..., {self.in_features})"
            )
        return linear(x, self.packed, self.bias, self._type_id, self.out_features, self.compute)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        tied = ", tied" if self.tied_to is not None else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, type={self.quant_type}, compute={self.compute}{tied}"
        )
