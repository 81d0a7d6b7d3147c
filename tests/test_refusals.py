"""One test per flag of a config that GGUF or llama.cpp cannot express: refused by name, never ignored."""

from __future__ import annotations

from typing import Any

import pytest

from azquant.architectures import ARCHITECTURES, architecture_of_config
from azquant.errors import ConversionError, ModelError, UnsupportedArchitectureError

DECODER: dict[str, Any] = {
    "vocab_size": 96, "max_position_embeddings": 64, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MIXTRAL = {"architectures": ["MixtralForCausalLM"]}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


def config_of(name: str, **change: Any) -> dict[str, Any]:
    """A config.json that converts, with ``change``."""
    architecture = ARCHITECTURES[name]
    needed = {"norm_topk_prob": True, "num_experts": 12} if name == "qwen3moe" else {}
    return {**DECODER, "architectures": [architecture.hf_names[0]], **needed, **change}


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gpt2"])
def test_the_config_without_a_change_converts_and_reads_back(name: str) -> None:
    architecture = ARCHITECTURES[name]
    config = architecture.config.from_hf(config_of(name))
    values = {key: value.value for key, value in config.metadata().items()}
    again = architecture.config.from_gguf(values)
    assert {key: value.value for key, value in again.metadata().items()} == values
    assert architecture.rules(again)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"rope_parameters": YARN}, "'yarn' is not supported"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        ("llama", {"sliding_window": 16, "model_type": "mistral", "head_dim": 15}, "head size is 15"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("qwen2", {"head_dim": 32}, "head_dim 32 times num_attention_heads 4 is not hidden_size 64"),
        ("qwen2", {"rope_parameters": YARN}, "'yarn' is not supported"),
        ("qwen2", {"rope_parameters": LLAMA3}, "'llama3' is not supported"),
        ("qwen2", {"layer_types": ["sliding_attention"]}, "layer_types is"),
        ("qwen2", {"layer_types": ["linear_attention"] * 4}, "layer_types is"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("qwen3", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("qwen3", {"rope_parameters": LONGROPE}, "'longrope' is not supported"),
        ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob is false"),
        ("qwen3moe", {"norm_topk_prob": None}, "norm_topk_prob is false"),
        ("qwen3moe", {"mlp_only_layers": [1]}, r"mlp_only_layers is \[1\]"),
        ("qwen3moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ("qwen3moe", {"attention_bias": True}, "attention_bias is True"),
        ("qwen3moe", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("qwen3moe", {"rope_parameters": YARN}, "'yarn' is not supported"),
        ("qwen3moe", {"num_experts": 0}, "num_experts is 0"),
        ("qwen3moe", {"num_experts": 1025}, "num_experts is 1025, outside 1 to 1024"),
        ("qwen3moe", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ("qwen3moe", {"num_experts_per_tok": 13}, "num_experts_per_tok is 13, outside 1 to 12"),
        ("qwen3moe", {"moe_intermediate_size": 0}, "moe_intermediate_size is 0"),
        ("llama", {**MIXTRAL, "hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {**MIXTRAL, "num_local_experts": 0}, "num_local_experts is 0"),
        ("llama", {**MIXTRAL, "num_local_experts": 1025}, "num_local_experts is 1025"),
        ("llama", {**MIXTRAL, "num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ("llama", {**MIXTRAL, "num_experts_per_tok": 9}, "num_experts_per_tok is 9, outside 1 to 8"),
        ("gemma2", {"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
        ("gemma2", {"attention_bias": True}, "attention_bias is True"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping is -1.0"),
        ("gemma2", {"rope_parameters": YARN}, "'yarn' is not supported"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is set"),
        ("gemma3", {"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ("gemma3", {"attention_bias": True}, "attention_bias is True"),
        ("gemma3", {"rope_parameters": {"full_attention": YARN, "sliding_attention": {}}}, "'yarn'"),
        (
            "gemma3",
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "linear", "factor": 2.0},
                }
            },
            "sliding_attention is scaled",
        ),
        ("phi3", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("phi3", {"attention_bias": True}, "attention_bias is True"),
        ("phi3", {"rope_parameters": YARN}, "'yarn' is not supported"),
        (
            "phi3",
            {"rope_parameters": {**LONGROPE, "short_factor": [1.0]}},
            "short_factor must be a list of 8",
        ),
        ("phi3", {"rope_parameters": {**LONGROPE, "long_factor": [0.0] * 8}}, "long_factor is 0.0"),
        ("phi3", {"partial_rotary_factor": 0.2}, "RoPE turns 3"),
        ("gptneox", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("gptneox", {"rotary_pct": 0.1}, "RoPE turns 1"),
        ("gptneox", {"rope_parameters": YARN}, "'yarn' is not supported"),
        ("starcoder2", {"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ("starcoder2", {"norm_type": "rms_norm"}, "norm_type is 'rms_norm'"),
        ("starcoder2", {"mlp_type": "gated"}, "mlp_type is 'gated'"),
        ("starcoder2", {"rope_parameters": YARN}, "'yarn' is not supported"),
        ("olmo2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("olmo2", {"attention_bias": True}, "attention_bias is True"),
        ("olmo2", {"rope_parameters": YARN}, "'yarn' is not supported"),
        ("granite", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier is 0"),
        ("granite", {"head_dim": 32}, "head_dim 32"),
        ("granite", {"rope_parameters": YARN}, "'yarn' is not supported"),
        ("falcon", {"alibi": True}, "alibi is True"),
        ("falcon", {"bias": True}, "bias is True"),
        ("falcon", {"parallel_attn": False}, "parallel_attn is False"),
        ("falcon", {"parallel_attn": None}, "parallel_attn is False"),
        ("falcon", {"activation": "relu"}, "activation is 'relu'"),
        ("falcon", {"multi_query": False, "num_kv_heads": 2}, "num_kv_heads is 2"),
        ("falcon", {"rope_parameters": YARN}, "'yarn' is not supported"),
    ],
)
def test_a_flag_is_refused_by_name(name: str, change: dict[str, Any], message: str) -> None:
    config = config_of(name, **change)
    with pytest.raises(ConversionError, match=message):
        architecture_of_config(config).config.from_hf(config)


@pytest.mark.parametrize(
    "name",
    [
        "Qwen2MoeForCausalLM",
        "OlmoeForCausalLM",
        "SmolLM3ForCausalLM",
        "Olmo3ForCausalLM",
        "GraniteMoeForCausalLM",
    ],
)
def test_models_that_do_not_fit_the_ops_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=name):
        architecture_of_config({"architectures": [name], **DECODER})


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("mistral", "llama"), ("gpt_neox", "gptneox"), ("gemma3_text", "gemma3"), ("RefinedWeb", "falcon")],
)
def test_model_type_alone_is_enough(model_type: str, name: str) -> None:
    assert architecture_of_config({"model_type": model_type}).name == name


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qwen2", {"qwen2.attention.sliding_window_pattern": [True], "qwen2.attention.sliding_window": 8}),
        ("qwen2", {"qwen2.logit_scale": 2.0}),
        ("qwen2", {"qwen2.attention.causal": False}),
        ("qwen3moe", {"qwen3moe.expert_count": 0}),
        ("qwen3moe", {"qwen3moe.expert_count": 1025}),
        ("qwen3moe", {"qwen3moe.expert_count": None}),
        ("qwen3moe", {"qwen3moe.expert_used_count": 0}),
        ("qwen3moe", {"qwen3moe.expert_used_count": 13}),
        ("qwen3moe", {"qwen3moe.expert_used_count": [8] * 4}),
        ("qwen3moe", {"qwen3moe.expert_feed_forward_length": -1}),
        ("qwen3moe", {"qwen3moe.expert_gating_func": 2}),
        ("qwen3moe", {"qwen3moe.expert_group_count": 4}),
        ("qwen3moe", {"qwen3moe.expert_weights_norm": False}),
        ("qwen3moe", {"qwen3moe.expert_weights_scale": 2.5}),
        ("qwen3moe", {"qwen3moe.expert_shared_count": 1}),
        ("qwen3moe", {"qwen3moe.expert_shared_feed_forward_length": 64}),
        ("gemma2", {"gemma2.attn_logit_softcapping": float("nan")}),
        ("gemma3", {"gemma3.rope.scaling.type": "yarn"}),
        ("phi3", {"phi3.rope.scaling.attn_factor": -1.0}),
        ("granite", {"granite.rope.scaling.finetuned": False}),
        ("granite", {"granite.attention.scale": "x"}),
        ("falcon", {"falcon.hidden_activation": "relu"}),
        ("starcoder2", {"starcoder2.attention.clamp_kqv": 8.0}),
        ("gptneox", {"gptneox.use_parallel_residual": 1}),
        ("gptneox", {"gptneox.attention.head_count_kv": 2}),
        ("olmo2", {"olmo2.attention.sliding_window": 8}),
    ],
)
def test_metadata_of_files_that_cannot_be_run(name: str, change: dict[str, Any]) -> None:
    architecture = ARCHITECTURES[name]
    config = architecture.config.from_hf(config_of(name))
    values = {key: value.value for key, value in config.metadata().items()} | change
    with pytest.raises(ModelError, match=next(iter(change)).split(".")[-1]):
        architecture.config.from_gguf(values)
