"""Small checkpoints for the conversion tests, written without torch, and the gguf package as the reader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

Tensors = dict[str, NDArray[Any]]

GPT2_CONFIG: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 96,
    "n_positions": 16,
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 2,
    "n_inner": 160,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "tie_word_embeddings": True,
}

LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "max_position_embeddings": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}

MIXTRAL_CONFIG: dict[str, Any] = {
    **LLAMA_CONFIG,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def gpt2_tensors(config: dict[str, Any], prefix: str = "transformer.", seed: int = 0) -> Tensors:
    """Random tensors as GPT2LMHeadModel saves them for ``config``, the head included when it is untied."""
    random = np.random.default_rng(seed)
    width, inner = config["n_embd"], config.get("n_inner") or 4 * config["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config["vocab_size"], width),
        "wpe.weight": (config["n_positions"], width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }
    for i in range(config["n_layer"]):
        for name, shape in (
            ("ln_1", (width,)),
            ("ln_2", (width,)),
            ("attn.c_attn", (width, 3 * width)),
            ("attn.c_proj", (width, width)),
            ("mlp.c_fc", (width, inner)),
            ("mlp.c_proj", (inner, width)),
        ):
            shapes[f"h.{i}.{name}.weight"] = shape
            shapes[f"h.{i}.{name}.bias"] = shape[-1:]
    tensors: Tensors = {
        prefix + name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()
    }
    if not config.get("tie_word_embeddings", True):
        tensors["lm_head.weight"] = random.standard_normal((config["vocab_size"], width), dtype=np.float32)
    return tensors


def llama_tensors(config: dict[str, Any], prefix: str = "model.", seed: int = 0) -> Tensors:
    """Random tensors as LlamaForCausalLM or MixtralForCausalLM saves them for ``config``."""
    random = np.random.default_rng(seed)
    width, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or width // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embed_tokens.weight": (config["vocab_size"], width),
        f"{prefix}norm.weight": (width,),
    }
    matrices = (("gate_proj", (inner, width)), ("up_proj", (inner, width)), ("down_proj", (width, inner)))
    feed_forward = [(f"mlp.{name}", shape, "mlp_bias") for name, shape in matrices]
    if count := config.get("num_local_experts"):
        feed_forward = [("block_sparse_moe.gate", (count, width), "")]
        for (_, shape), name in zip(matrices, ("w1", "w3", "w2"), strict=True):
            experts = (f"block_sparse_moe.experts.{expert}" for expert in range(count))
            feed_forward += [(f"{expert}.{name}", shape, "") for expert in experts]
    for i in range(config["num_hidden_layers"]):
        layer = f"{prefix}layers.{i}."
        shapes[f"{layer}input_layernorm.weight"] = (width,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (width,)
        for name, shape, biased in (
            ("self_attn.q_proj", (q, width), "attention_bias"),
            ("self_attn.k_proj", (kv, width), "attention_bias"),
            ("self_attn.v_proj", (kv, width), "attention_bias"),
            ("self_attn.o_proj", (width, q), "attention_bias"),
            *feed_forward,
        ):
            shapes[f"{layer}{name}.weight"] = shape
            if config.get(biased):
                shapes[f"{layer}{name}.bias"] = shape[:1]
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write_checkpoint(folder: Path, config: dict[str, Any] | None, tensors: Tensors) -> Path:
    """A folder as save_pretrained leaves it, without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_sharded(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    """The same in two shards with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weight_map = {}
    for part in (0, 1):
        name = f"model-0000{part + 1}-of-00002.safetensors"
        shard = dict(list(tensors.items())[part::2])
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return folder


def read_tensors(path: Path) -> dict[str, tuple[tuple[int, ...], str, bytes]]:
    """Name to (NumPy shape, type, bytes), as the gguf package reads the file."""
    return {
        tensor.name: (
            tuple(int(n) for n in reversed(tensor.shape)),
            tensor.tensor_type.name,
            tensor.data.tobytes(),
        )
        for tensor in gguf.GGUFReader(path).tensors
    }


def read_metadata(path: Path) -> dict[str, tuple[str, Any]]:
    """Key to (type, value), as the gguf package reads the file."""
    return {
        name: (field.types[0].name, field.contents())
        for name, field in gguf.GGUFReader(path).fields.items()
        if not name.startswith("GGUF.")
    }


def as_f32(path: Path, name: str) -> NDArray[np.float32]:
    """An F32 tensor of a GGUF file."""
    shape, kind, data = read_tensors(path)[name]
    assert kind == "F32"
    return np.frombuffer(data, np.float32).reshape(shape)


def quantized(x: NDArray[np.float32], kind: str) -> bytes:
    """What the gguf package makes of ``x``."""
    result: bytes = gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind]).tobytes()
    return result


_LLAMA_CPP = """
import json, sys, urllib.request
import xllamacpp
path, n_ctx, adapter, *requests = json.load(sys.stdin)
parameters = xllamacpp.CommonParams()
parameters.model.path = path
parameters.n_ctx = n_ctx
parameters.n_parallel = 1
parameters.cpuparams.n_threads = 2
parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
if adapter:
    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = adapter, 1.0
    parameters.lora_adapters = [lora]
server = xllamacpp.Server(parameters)
answers = []
for request in requests:
    body = json.dumps({"temperature": 0, "cache_prompt": False, **request}).encode()
    url = server.listening_address + "/completion"
    question = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(question) as answer:
        answers.append(json.load(answer))
print("ANSWERS", json.dumps(answers))
"""


def llama_cpp(
    path: Path, *requests: dict[str, Any], n_ctx: int = 128, adapter: Path | None = None
) -> list[dict[str, Any]]:
    """What llama.cpp's /completion endpoint answers with the model ``path``, greedily.

    ``adapter`` is a GGUF file of LoRA matrices that it applies.

    In a process of its own: where llama.cpp cannot go on, it aborts.
    """
    pytest.importorskip("xllamacpp")
    done = subprocess.run(
        [sys.executable, "-c", _LLAMA_CPP],
        input=json.dumps([str(path), n_ctx, adapter and str(adapter), *requests]),
        capture_output=True,
        text=True,
        timeout=120,
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    if done.returncode or not answers:
        pytest.fail(f"llama.cpp ended with status {done.returncode}: {done.stderr[-2000:]}")
    result: list[dict[str, Any]] = json.loads(answers[-1].removeprefix("ANSWERS "))
    return result
