"""Running models: load a GGUF file, get logits, generate text."""

from azquant.engine._memory import MemoryNeeds
from azquant.engine.generation import Generation
from azquant.engine.model import Model, load
from azquant.engine.options import GenerateOptions, Options
from azquant.engine.request import Completion, TokenLogprob
from azquant.engine.sampling import Sampler

__all__ = [
    "Completion",
    "GenerateOptions",
    "Generation",
    "MemoryNeeds",
    "Model",
    "Options",
    "Sampler",
    "TokenLogprob",
    "load",
]
