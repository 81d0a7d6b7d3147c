"""Judging files: whether one is whole, and how far its weights are from those it was made of.

>>> from azquant.evaluate import verify
>>> report = verify("az-llm-q4_0.gguf", "az_llm_hf")
"""

from azquant.evaluate.hashes import tensor_sha256
from azquant.evaluate.picture import plot_file, plot_verification
from azquant.evaluate.verify import TensorCheck, VerifyReport, verify

__all__ = [
    "TensorCheck",
    "VerifyReport",
    "plot_file",
    "plot_verification",
    "tensor_sha256",
    "verify",
]
