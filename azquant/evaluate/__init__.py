"""Measuring models: perplexity, divergence from another model, importance matrices."""

from azquant.evaluate.collect import collect_imatrix
from azquant.evaluate.perplexity import Divergence, Perplexity, evaluate
from azquant.evaluate.plot import plot_positions

__all__ = ["Divergence", "Perplexity", "collect_imatrix", "evaluate", "plot_positions"]
