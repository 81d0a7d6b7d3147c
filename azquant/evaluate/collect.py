"""Collecting importance matrices while a model reads a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

from azquant.engine import Model, load
from azquant.engine.session import STEP_TOKENS
from azquant.errors import ModelError
from azquant.evaluate.windows import cut, text_tokens
from azquant.imatrix import Imatrix
from azquant.program import Buffer, Op, ProgramSpec, Ref

__all__ = ["collect_imatrix"]

Doubles = npt.NDArray[np.float64]

_STEP_BYTES = 64 << 20


@dataclass(frozen=True)
class _Taps:
    """A program that gives activations instead of logits, and whose columns they are."""

    spec: ProgramSpec[Any]
    columns: dict[str, slice]
    """Matrix name -> its inputs among the program's outputs."""


def _tap(spec: ProgramSpec[Any], names: dict[int, str]) -> _Taps:
    """``spec`` up to its last linear inside a block, with every input of a linear copied to the outputs.

    Linears with the same input share the copy. The last op of a program must write all its outputs: here it
    writes them over themselves.
    """
    taps = Ref(len(spec.buffers))
    ops: list[Op[Any]] = []
    columns: dict[str, slice] = {}
    held: dict[Ref, slice] = {}  # inputs that were copied and have not changed since
    width, end = 0, 0
    for op in spec.ops:
        if op.kind == "linear" and op.a and op.w is not None and not spec.buffers[op.a.buffer].outputs:
            k = op.w.shape[1]
            if op.a not in held:
                held[op.a] = slice(width, width + k)
                ops.append(Op("select", taps.at(width), k, a=op.a))
                width += k
            columns[names[id(op.w)]] = held[op.a]
            end = len(ops)
        ops.append(op)
        held = {ref: place for ref, place in held.items() if ref.buffer != op.out.buffer}
    ops = [*ops[:end], Op("add", taps, width, a=taps, b=taps, scale=0.0)]
    buffers = (*spec.buffers, Buffer(width, outputs=True))
    return _Taps(replace(spec, ops=tuple(ops), buffers=buffers, n_vocab=width), columns)


def collect_imatrix(
    model: Model | str | PathLike[str],
    text: str,
    *,
    n_ctx: int | None = None,
    chunks: int | None = None,
    dataset: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Imatrix:
    """Lets ``model`` read ``text`` and sums the squared activations that enter each matrix of its blocks.

    As llama-imatrix: windows of ``n_ctx`` tokens (512 unless given or the model has fewer), each computed on
    its own, every position counted; embedding and output head are left out. ``dataset`` names the text in the
    file. ``progress(done, total)`` is told the windows.

    Raises what :func:`azquant.load` raises, ArgumentError for a text shorter than one window, ModelError for
    activations that are not finite and for mixtures of experts.
    """
    if not isinstance(model, Model):
        model = load(model)
    if any(op.experts for op in model._spec.ops):
        raise ModelError(f"{model.path}: importances of experts cannot be measured yet; use llama-imatrix")
    windows = cut(model, text_tokens(model, text), n_ctx, chunks)
    taps = _tap(model._spec, model._weights.names())
    width = taps.spec.n_vocab
    session = model.session(n_ctx=windows.n_ctx, spec=taps.spec)
    step = max(1, min(STEP_TOKENS, _STEP_BYTES // (4 * width)))
    sums: Doubles = np.zeros(width)
    for done, window in enumerate(windows.tokens):
        session.lengths[0] = 0
        for at in range(0, len(window), step):
            x = session.feed([(0, window[at : at + step])], every=True)
            sums += np.square(x, out=x).sum(axis=0, dtype=np.float64)
        if progress is not None:
            progress(done + 1, len(windows.tokens))
    if not np.isfinite(sums).all():
        raise ModelError(f"{model.path}: activations are not finite; the weights are damaged")
    return Imatrix(
        {name: sums[place].copy() for name, place in taps.columns.items()},
        dict.fromkeys(taps.columns, np.asarray(float(windows.tokens.size))),
        (dataset,) if dataset else (),
        len(windows.tokens),
        windows.n_ctx,
    )
