"""Pictures of evaluations."""

from __future__ import annotations

from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from azquant.errors import ArgumentError, MissingDependencyError, OutputError
from azquant.evaluate.perplexity import Divergence, Perplexity

__all__ = ["plot_positions"]

_FORMATS = (".png", ".svg", ".pdf")
_POINTS = 64


def plot_positions(
    path: str | PathLike[str], result: Perplexity, divergence: Divergence | None = None, *, title: str = ""
) -> None:
    """Draw perplexity, and divergence where there is one, over the position in the window.

    A model that makes use of its context predicts better the more of it there is. ``path`` ends in .png, .svg
    or .pdf and is replaced if it exists. Raises MissingDependencyError without matplotlib, ArgumentError,
    OutputError.
    """
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise ArgumentError(f"{path}: a picture's name must end in {', '.join(_FORMATS)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib: pip install 'azquant[plot]'") from error
    figure: Any = Figure(figsize=(8, 3 if divergence is None else 6), layout="constrained")
    axes = figure.subplots(1 if divergence is None else 2, 1, sharex=True, squeeze=False)[:, 0]
    x, nll = _binned(result.nll, result.first)
    axes[0].plot(x, np.exp(nll), label="model")
    axes[0].set_ylabel("perplexity")
    if divergence is not None:
        axes[0].plot(x, np.exp(_binned(divergence.base.nll, result.first)[1]), label="base", linestyle="--")
        axes[0].legend()
        axes[1].plot(x, _binned(divergence.kl, result.first)[1])
        axes[1].set_ylabel("KL(base || model), nats")
        axes[1].set_yscale("log" if (divergence.kl > 0).all() else "linear")
    axes[-1].set_xlabel(f"position in a window of {result.n_ctx} tokens")
    if title:
        axes[0].set_title(title)
    try:
        figure.savefig(path)
    except OSError as error:
        raise OutputError(f"{path}: the picture cannot be written ({error})") from error


def _binned(values: Any, first: int) -> tuple[Any, Any]:
    """Means over the windows and over neighbouring positions, for at most _POINTS points."""
    edges = np.unique(np.linspace(0, values.shape[1], min(_POINTS, values.shape[1]) + 1).astype(int))
    means = [values[:, a:b].mean() for a, b in pairwise(edges)]
    return first + (edges[:-1] + edges[1:] - 1) / 2, np.array(means)
