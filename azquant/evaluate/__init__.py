"""Judging files and measuring models.

Whether a file is whole and how far its weights are from those it was made of (:func:`verify`); whether a
conversion kept the model (:func:`prove`); perplexity and divergence from another model (:func:`evaluate`);
importance matrices (:func:`collect_imatrix`).

>>> from azquant.evaluate import evaluate, verify
>>> report = verify("az-llm-q4_0.gguf", "az_llm_hf")
"""

from azquant.evaluate.collect import collect_imatrix
from azquant.evaluate.hashes import tensor_sha256
from azquant.evaluate.perplexity import Divergence, Perplexity, evaluate
from azquant.evaluate.picture import plot_file, plot_verification
from azquant.evaluate.plot import plot_positions
from azquant.evaluate.prove import Distance, Proof, prove
from azquant.evaluate.verify import TensorCheck, VerifyReport, verify

__all__ = [
    "Distance",
    "Divergence",
    "Perplexity",
    "Proof",
    "TensorCheck",
    "VerifyReport",
    "collect_imatrix",
    "evaluate",
    "plot_file",
    "plot_positions",
    "plot_verification",
    "prove",
    "tensor_sha256",
    "verify",
]
