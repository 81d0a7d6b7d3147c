"""Model management: versions by name and tag, in a folder that Ollama can read and write too.

>>> from azquant.store import Store
>>> store = Store()                      # AZQUANT_MODELS, or the platform's data folder
>>> store.create("az-llm:v1.0", "az-llm-v1.0-q4_0.gguf")
>>> azquant.load(store.path("az-llm:v1.0")).generate("Azərbaycan")
"""

from azquant.store.check import Problem
from azquant.store.compare import Change, Comparison
from azquant.store.info import ModelInfo, ModelRow
from azquant.store.manifest import Layer
from azquant.store.modelfile import Message, Modelfile, parse_modelfile, read_modelfile
from azquant.store.names import ModelName
from azquant.store.store import Store, default_root, ollama_root, resolve

__all__ = [
    "Change",
    "Comparison",
    "Layer",
    "Message",
    "ModelInfo",
    "ModelName",
    "ModelRow",
    "Modelfile",
    "Problem",
    "Store",
    "default_root",
    "ollama_root",
    "parse_modelfile",
    "read_modelfile",
    "resolve",
]
