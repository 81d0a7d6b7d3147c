"""Quantized layers for PyTorch on the CPU, on the bytes that GGUF files hold.

>>> from azquant.torch import quantize_, save_gguf
>>> report = quantize_(model, "q4_0")          # nn.Linear, nn.Embedding and Conv1D, in place
>>> save_gguf(model, "model-q4_0.gguf", folder="my_model_hf")

Raises MissingDependencyError on import where PyTorch is not installed.
"""

from azquant.errors import MissingDependencyError

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise MissingDependencyError(
        "azquant.torch needs PyTorch 2.4 or later: pip install 'azquant[torch]' (for the small CPU build add "
        "--index-url https://download.pytorch.org/whl/cpu)"
    ) from error

from azquant.torch.embedding import QuantEmbedding
from azquant.torch.export import save_gguf, save_lora_gguf
from azquant.torch.gguf import load_gguf
from azquant.torch.linear import QuantLinear
from azquant.torch.quantize import QuantizeReport, quantize_

__all__ = [
    "QuantEmbedding",
    "QuantLinear",
    "QuantizeReport",
    "load_gguf",
    "quantize_",
    "save_gguf",
    "save_lora_gguf",
]
