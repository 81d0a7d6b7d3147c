"""Running models: load a GGUF file, get logits, generate text."""

from azquant.engine.model import Model, load
from azquant.engine.sampling import Sampler

__all__ = ["Model", "Sampler", "load"]
