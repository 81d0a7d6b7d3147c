"""The operators that PyTorch knows: ``azquant::linear``, its backward, and ``azquant::embedding``.

Weights are a uint8 tensor in packed form (see :mod:`azquant.torch.packed`), so that each operator is a pure
function of tensors: tracing, exporting, copying and sharing need nothing special. Each call uses as many
threads as ``torch.get_num_threads()`` says, and PyTorch's own where they are OpenMP's.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch

from azquant import cpu
from azquant._backend import kernels
from azquant.errors import ArgumentError, DTypeError, ShapeError

__all__ = ["embedding", "linear", "prepare"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_BAND_ELEMENTS = 1 << 22
"""Weights held in float32 at a time by the backward (16 MiB)."""

_LIBRARY: Any = torch.library.Library("azquant", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "linear(Tensor x, Tensor packed, Tensor? bias, int type, int out_features, str compute) -> Tensor"
)
_LIBRARY.define("linear_backward(Tensor grad, Tensor packed, int type, int in_features) -> Tensor")
_LIBRARY.define(
    "embedding(Tensor indices, Tensor packed, int type, int rows, int columns, ScalarType dtype) -> Tensor"
)


# ---- threads -----------------------------------------------------------------------------------------


@cache
def prepare() -> None:
    """Once, before the first work: the kernels run on PyTorch's own OpenMP threads where it has any.

    OpenMP's idle threads stay awake for milliseconds, and a second pool would share the processors with them.
    """
    cpu._prepare()
    if torch.backends.openmp.is_available():  # type: ignore[no-untyped-call]
        try:
            start = ctypes.CDLL(torch._C.__file__).GOMP_parallel  # the one that PyTorch is linked with
        except (OSError, AttributeError):
            return  # another OpenMP: two pools then
        kernels().use_team(ctypes.cast(start, ctypes.c_void_p).value)


# ---- what modules call -------------------------------------------------------------------------------


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    type_id: int,
    out_features: int,
    compute: str = "auto",
) -> torch.Tensor:
    """``x`` (..., K) times the transpose of packed weights (N, K), plus ``bias`` (N,) -> (..., N).

    The result has x's dtype. Computed in float32; under autocast the input and the result have autocast's
    dtype, as in ``nn.Linear``.
    Differentiable in ``x`` and ``bias``, with the gradient of the dequantized weights.

    Raises ArgumentError for tensors not on the CPU, DTypeError, ShapeError, UnsupportedTypeError.
    """
    if not x.is_cpu:
        raise _not_on_cpu(f"the input is on {x.device}", x)
    if torch.is_autocast_enabled("cpu") and x.is_floating_point():
        x = x.to(torch.get_autocast_dtype("cpu"))
    if x.dtype not in _FLOATS:
        raise DTypeError(f"the input must be float32, bfloat16 or float16, not {x.dtype}")
    y: torch.Tensor = torch.ops.azquant.linear.default(x, packed, bias, type_id, out_features, compute)
    return y


def embedding(
    indices: torch.Tensor, packed: torch.Tensor, type_id: int, rows: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """The rows of packed weights that ``indices`` (...) name, dequantized -> (..., columns) of ``dtype``.

    Raises ArgumentError for tensors not on the CPU, DTypeError for indices that are not int32 or int64,
    ShapeError for an index out of range.
    """
    if not indices.is_cpu:
        raise _not_on_cpu(f"the indices are on {indices.device}", indices)
    if indices.dtype not in (torch.int64, torch.int32):
        raise DTypeError(f"indices must be int32 or int64, not {indices.dtype}")
    y: torch.Tensor = torch.ops.azquant.embedding.default(indices, packed, type_id, rows, columns, dtype)
    return y


def _not_on_cpu(what: str, x: torch.Tensor) -> ArgumentError:
    advice = "it holds no values, and needs some" if x.is_meta else "use .cpu()"
    return ArgumentError(f"azquant computes on the CPU, but {what}: {advice}")


# ---- on the CPU --------------------------------------------------------------------------------------


def _weights(packed: torch.Tensor, type_id: int, n: int, k: int) -> torch.Tensor:
    """The packed bytes as the kernels take them, checked: they read past a shorter array."""
    prepare()
    needed = kernels().packed_bytes(type_id, n, k)
    if packed.dtype is not torch.uint8 or needed < 0 or packed.numel() != needed:
        raise ShapeError(
            f"packed weights of {packed.numel()} bytes ({packed.dtype}) are not those of a matrix ({n}, {k})"
        )
    if packed.data_ptr() % 64 or not packed.is_contiguous():  # the kernels load whole cache lines
        packed = packed.clone(memory_format=torch.contiguous_format)
    return packed


def _float32(x: torch.Tensor) -> torch.Tensor:
    """As float32, contiguous. Kernels are handed addresses or arrays, so that no gradient is in the way."""
    if x.dtype is not torch.float32:
        x = x.detach().to(torch.float32)
    return x if x.is_contiguous() else x.detach().contiguous()


def _linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    type: int,
    out_features: int,
    compute: str,
) -> torch.Tensor:
    *lead, k = x.shape
    n = out_features
    weights = _weights(packed, type, n, k)
    y = torch.empty(*lead, n, dtype=torch.float32)
    if bias is not None:
        if bias.shape != (n,):  # the kernels read n numbers
            raise ShapeError(f"the bias has shape {tuple(bias.shape)}, the weight ({n}, {k}) needs ({n},)")
        bias = _float32(bias)
    if k == 0:
        y.zero_() if bias is None else y.copy_(bias)
    elif y.numel():
        flat = _float32(x)
        kernels().matmul_packed(
            type,
            weights.data_ptr(),
            n,
            k,
            0 if bias is None else bias.data_ptr(),
            flat.data_ptr(),
            flat.numel() // k,
            y.data_ptr(),
            compute,
            torch.get_num_threads(),
        )
    return y if x.dtype is torch.float32 else y.to(x.dtype)


def _linear_backward(grad: torch.Tensor, packed: torch.Tensor, type: int, in_features: int) -> torch.Tensor:
    """grad (..., N) times the dequantized weights (N, K) -> (..., K), a band of weight rows at a time."""
    n, k = grad.shape[-1], in_features
    weights = _weights(packed, type, n, k).detach().numpy()
    flat = _float32(grad.detach()).reshape(-1, n)
    out = torch.zeros((flat.shape[0], k), dtype=torch.float32)
    step = max(1, _BAND_ELEMENTS // max(1, k))
    band = torch.empty((min(step, n), k), dtype=torch.float32)
    for start in range(0, n if flat.shape[0] and k else 0, step):
        rows = np.arange(start, min(start + step, n))
        some = band[: len(rows)]
        kernels().packed_rows(type, weights, n, k, rows, some.numpy(), torch.get_num_threads())
        out.addmm_(flat[:, start : start + len(rows)], some)
    return out.reshape(*grad.shape[:-1], k).to(grad.dtype)


def _embedding(
    indices: torch.Tensor, packed: torch.Tensor, type: int, rows: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    weights = _weights(packed, type, rows, columns).detach().numpy()
    wanted = indices.detach().to(torch.int64).contiguous().numpy().reshape(-1)
    out = torch.empty((*indices.shape, columns), dtype=torch.float32)
    if wanted.size:
        if int(wanted.min()) < 0 or int(wanted.max()) >= rows:
            raise ShapeError(
                f"an index is out of range: {wanted.min()} .. {wanted.max()}, the table has {rows} rows"
            )
        flat = out.numpy().reshape(-1, columns)
        kernels().packed_rows(type, weights, rows, columns, wanted, flat, torch.get_num_threads())
    return out if dtype is torch.float32 else out.to(dtype)


_LIBRARY.impl("linear", _linear, "CPU")
_LIBRARY.impl("linear_backward", _linear_backward, "CPU")
_LIBRARY.impl("embedding", _embedding, "CPU")


# ---- while tracing -----------------------------------------------------------------------------------


@torch.library.register_fake("azquant::linear", lib=_LIBRARY)
def _(x, packed, bias, type, out_features, compute):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("azquant::linear_backward", lib=_LIBRARY)
def _(grad, packed, type, in_features):  # type: ignore[no-untyped-def]
    return grad.new_empty((*grad.shape[:-1], in_features))


@torch.library.register_fake("azquant::embedding", lib=_LIBRARY)
def _(indices, packed, type, rows, columns, dtype):  # type: ignore[no-untyped-def]
    return indices.new_empty((*indices.shape, columns), dtype=dtype)


# ---- gradients ---------------------------------------------------------------------------------------


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, packed, bias, ctx.type, ctx.out_features, _ = inputs
    ctx.save_for_backward(packed)
    ctx.in_features = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    (packed,) = ctx.saved_tensors
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = torch.ops.azquant.linear_backward.default(grad, packed, ctx.type, ctx.in_features)
    if ctx.needs_input_grad[2]:
        of_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return of_x, None, of_bias, None, None, None


def _remember_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    grad, packed, ctx.type, _ = inputs
    ctx.save_for_backward(packed)
    ctx.out_features = grad.shape[-1]


def _gradients_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    (packed,) = ctx.saved_tensors
    of_grad = torch.ops.azquant.linear.default(grad, packed, None, ctx.type, ctx.out_features, "fp32")
    return of_grad, None, None, None


torch.library.register_autograd("azquant::linear", _gradients, setup_context=_remember, lib=_LIBRARY)
torch.library.register_autograd(
    "azquant::linear_backward", _gradients_backward, setup_context=_remember_backward, lib=_LIBRARY
)
