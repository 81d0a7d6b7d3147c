"""Tiny random models of every architecture, as transformers saves them, with flags away from defaults."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

VOCAB_SIZE = 257

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 5000.0,
}  # fmt: skip
LINEAR_ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
ROPE = {"rope_type": "default", "rope_theta": 500.0}
LOCAL_ROPE = {"rope_type": "default", "rope_theta": 50.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 500.0, "partial_rotary_factor": 0.75, "factor": 2.0,
    "short_factor": [1.0 + 0.1 * i for i in range(6)], "long_factor": [2.0 + 0.5 * i for i in range(6)],
    "original_max_position_embeddings": 256,
}  # fmt: skip
LAYERS = ["full_attention", "sliding_attention", "sliding_attention"]
WINDOW = {"sliding_window": 16}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 16}
QWEN_MIXTURE = {
    "num_experts": 9, "num_experts_per_tok": 4, "moe_intermediate_size": 40, "norm_topk_prob": True,
}  # fmt: skip
GEMMA = {"head_dim": 24, "sliding_window": 16, "query_pre_attn_scalar": 10, "final_logit_softcapping": 5.0}
GRANITE = {
    "attention_multiplier": 0.4, "embedding_multiplier": 6.0, "residual_multiplier": 0.3,
    "logits_scaling": 4.0,
}  # fmt: skip

# name: (class name without ForCausalLM, window, options). Texts longer than the window tell whether it is
# honoured; where llama.cpp has none (window > 0), it is judged on a text no longer than that.
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "gpt2": (
        "GPT2",
        0,
        {
            "n_embd": 64, "n_head": 4, "n_layer": 3, "n_inner": 256, "n_positions": 128,
            "scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-3,
        },
    ),
    "llama": (
        "Llama",
        0,
        {
            "head_dim": 32, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE,
            "rms_norm_eps": 1e-3, "tie_word_embeddings": False,
        },
    ),
    "smollm": (
        "Llama",
        0,
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_parameters": LINEAR_ROPE},
    ),
    "mistral": (
        "Mistral", 16, {**WINDOW, "head_dim": 24, "rope_parameters": ROPE, "rms_norm_eps": 1e-3},
    ),
    "mixtral": (
        "Mixtral",
        16,
        {
            **WINDOW, "head_dim": 24, "num_local_experts": 5, "num_experts_per_tok": 3, "rms_norm_eps": 1e-3,
            "rope_parameters": ROPE, "router_jitter_noise": 0.1, "tie_word_embeddings": True,
        },
    ),
    "mixtral one of eight": (
        "Mixtral", 0, {"num_local_experts": 8, "num_experts_per_tok": 1, "rope_parameters": LLAMA3_ROPE},
    ),
    "mixtral alone": ("Mixtral", 0, {"num_local_experts": 1, "num_experts_per_tok": 1}),
    "qwen2": (
        "Qwen2",
        16,
        {**QWEN_WINDOW, "max_window_layers": 1, "rope_parameters": ROPE, "tie_word_embeddings": True},
    ),
    "qwen3": (
        "Qwen3",
        16,
        {
            **QWEN_WINDOW, "head_dim": 24, "max_window_layers": 2, "rope_parameters": LINEAR_ROPE,
            "rms_norm_eps": 1e-3,
        },
    ),
    "qwen3moe": (
        "Qwen3Moe",
        16,
        {
            **QWEN_WINDOW, **QWEN_MIXTURE, "head_dim": 24, "rope_parameters": LINEAR_ROPE,
            "rms_norm_eps": 1e-3, "output_router_logits": True,
        },
    ),
    "qwen3moe all": (
        "Qwen3Moe",
        0,
        {**QWEN_MIXTURE, "num_experts_per_tok": 9, "moe_intermediate_size": 160, "tie_word_embeddings": True},
    ),
    "gemma2": ("Gemma2", 0, {**GEMMA, "attn_logit_softcapping": 3.0, "rope_parameters": ROPE}),
    "gemma2 layers": (
        "Gemma2",
        0,
        {
            **WINDOW, "head_dim": 16, "query_pre_attn_scalar": 16, "layer_types": LAYERS,
            "attn_logit_softcapping": None, "final_logit_softcapping": None,
        },
    ),
    "gemma3": (
        "Gemma3",
        0,
        {**GEMMA, "rope_parameters": {"full_attention": LINEAR_ROPE, "sliding_attention": LOCAL_ROPE}},
    ),
    "gemma3 layers": (
        "Gemma3",
        0,
        {
            **WINDOW, "head_dim": 24, "query_pre_attn_scalar": 24, "layer_types": LAYERS,
            "tie_word_embeddings": False,
        },
    ),
    "phi3": (
        "Phi3",
        16,
        {
            **WINDOW, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}, "rms_norm_eps": 1e-3,
            "pad_token_id": 0, "original_max_position_embeddings": 128,
        },
    ),
    "phi3 longrope": (
        "Phi3",
        0,
        {
            "rope_parameters": LONGROPE, "original_max_position_embeddings": 256, "sliding_window": None,
            "max_position_embeddings": 512, "tie_word_embeddings": True, "pad_token_id": 0,
        },
    ),
    "gptneox": (
        "GPTNeoX",
        0,
        {
            "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}, "layer_norm_eps": 1e-3,
            "hidden_act": "gelu",
        },
    ),
    "gptneox serial": (
        "GPTNeoX",
        0,
        {
            "rope_parameters": {**LINEAR_ROPE, "partial_rotary_factor": 0.25}, "use_parallel_residual": False,
            "attention_bias": False, "hidden_act": "gelu_fast", "tie_word_embeddings": True,
        },
    ),
    "starcoder2": ("Starcoder2", 16, {**WINDOW, "rope_parameters": ROPE, "norm_epsilon": 1e-3}),
    "starcoder2 bare": (
        "Starcoder2",
        0,
        {"sliding_window": None, "use_bias": False, "hidden_act": "gelu", "tie_word_embeddings": False},
    ),
    "olmo2": ("Olmo2", 0, {"rope_parameters": ROPE, "rms_norm_eps": 1e-3, "pad_token_id": 0}),
    "olmo2 tied": ("Olmo2", 0, {"num_key_value_heads": 4, "tie_word_embeddings": True, "pad_token_id": 0}),
    "granite": (
        "Granite",
        0,
        {**GRANITE, "rope_parameters": LINEAR_ROPE, "attention_bias": True, "mlp_bias": True},
    ),
    "falcon": (
        "Falcon", 0, {"rope_parameters": ROPE, "ffn_hidden_size": 256, "layer_norm_epsilon": 1e-3},
    ),
    "falcon heads": ("Falcon", 0, {"num_kv_heads": 4, "multi_query": False, "activation": "gelu_new"}),
    "falcon grouped": (
        "Falcon",
        0,
        {
            "num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 96,
            "tie_word_embeddings": False,
        },
    ),
    "falcon one norm": (
        "Falcon", 0, {"num_kv_heads": 2, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    ),
}  # fmt: skip


def build(name: str) -> Any:
    """The model, in float32 and evaluation mode, with weights strong enough to tell mistakes apart."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    stem, _, options = MODELS[name]
    sizes = {} if stem == "GPT2" else dict(SIZES)
    if stem in ("Falcon", "GPTNeoX"):
        del sizes["num_key_value_heads"]
    if stem == "Falcon":
        del sizes["intermediate_size"]
    config_class = getattr(transformers, f"{stem}TextConfig" if stem == "Gemma3" else f"{stem}Config")
    suffix = "LMHeadModel" if stem == "GPT2" else "ForCausalLM"
    ids = {"bos_token_id": VOCAB_SIZE - 1, "eos_token_id": VOCAB_SIZE - 1}
    config = config_class(vocab_size=VOCAB_SIZE, attn_implementation="eager", **{**sizes, **ids, **options})
    model = getattr(transformers, stem + suffix)(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # no bias left at zero, no norm at one
            random = np.random.default_rng(zlib.crc32(key.encode()))  # the same for every version of torch
            values = random.standard_normal(tuple(parameter.shape), dtype=np.float32) * np.float32(0.3)
            if key.endswith("weight") and parameter.ndim == 1 and "Gemma" not in stem:
                values += 1
            parameter.copy_(torch.from_numpy(values))
    return model.eval()


def byte_tokenizer() -> Any:
    """The smallest tokenizer llama.cpp can run: one token per byte, and an end token."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def save(model: Any, folder: Path) -> Path:
    """save_pretrained, with the byte tokenizer beside."""
    model.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def tokens(count: int) -> list[int]:
    """Random tokens, without the end token."""
    found: list[int] = np.random.default_rng(2).integers(0, VOCAB_SIZE - 1, count).tolist()
    return found


def logits(model: Any, ids: list[int]) -> Any:
    """transformers' logits (T, vocab) as a NumPy array."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()
