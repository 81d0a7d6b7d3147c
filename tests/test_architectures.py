"""Configs read back from GGUF metadata, and the tensors they ask for: stock files, and impossible ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from convert_support import GPT2_CONFIG, LLAMA_CONFIG, MIXTRAL_CONFIG

from azquant.architectures import (
    ARCHITECTURES,
    GPT2Config,
    LlamaConfig,
    architecture_of_config,
    architecture_of_gguf,
)
from azquant.errors import ModelError
from azquant.gguf import open_gguf

CONFIGS: list[tuple[type[Any], dict[str, Any]]] = [
    (GPT2Config, GPT2_CONFIG),
    (LlamaConfig, LLAMA_CONFIG),
    (LlamaConfig, MIXTRAL_CONFIG),
]


def gguf_values(kind: type[Any], config: dict[str, Any]) -> dict[str, Any]:
    return {key: value.value for key, value in kind.from_hf(config).metadata().items()}


@pytest.mark.parametrize(("kind", "config"), CONFIGS)
def test_what_is_written_reads_back(kind: type[Any], config: dict[str, Any]) -> None:
    values = gguf_values(kind, config)
    again = kind.from_gguf(values)
    assert {key: value.value for key, value in again.metadata().items()} == values


def test_linear_rope_reads_back() -> None:
    config = {**LLAMA_CONFIG, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert LlamaConfig.from_gguf(gguf_values(LlamaConfig, config)).rope.scale == 4.0


@pytest.mark.parametrize(
    ("change", "scale"),
    [
        ({}, 1.0),
        ({"llama.rope.scaling.factor": 4.0}, 4.0),  # llama.cpp takes an unnamed kind for linear
        ({"llama.rope.scale_linear": 2.0}, 2.0),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, 1.0),
    ],
)
def test_rope_scale_as_llama_cpp_reads_it(change: dict[str, Any], scale: float) -> None:
    assert LlamaConfig.from_gguf(gguf_values(LlamaConfig, LLAMA_CONFIG) | change).rope.scale == scale


def test_optional_keys_have_llama_cpps_defaults() -> None:
    values = gguf_values(LlamaConfig, {**LLAMA_CONFIG, "num_key_value_heads": 4, "head_dim": None})
    for key in ("attention.head_count_kv", "attention.key_length", "attention.value_length"):
        del values[f"llama.{key}"]
    del values["llama.rope.dimension_count"], values["llama.rope.freq_base"]
    config = LlamaConfig.from_gguf(values)
    assert (config.head_count_kv, config.head_dim, config.rope_dimension, config.rope.base) == (
        4,
        16,
        16,
        10000.0,
    )


def test_the_token_list_decides_the_vocabulary() -> None:
    values = gguf_values(GPT2Config, GPT2_CONFIG) | {"tokenizer.ggml.tokens": ["a", "b", "c"]}
    assert GPT2Config.from_gguf(values).vocab_size == 3


REQUIRED = [
    (kind, config, key)
    for kind, config in CONFIGS
    for key in ("vocab_size", "context_length", "embedding_length", "feed_forward_length", "block_count")
]


@pytest.mark.parametrize(("kind", "config", "key"), REQUIRED)
@pytest.mark.parametrize("value", [None, 0, -1, 2**32 - 1, "5", 5.0, True])
def test_sizes_that_cannot_be(kind: type[Any], config: dict[str, Any], key: str, value: Any) -> None:
    values = gguf_values(kind, config)
    name = next(iter(values)).split(".")[0]
    values[f"{name}.{key}"] = value
    with pytest.raises(ModelError, match=rf"{name}\.{key}"):
        kind.from_gguf(values)


@pytest.mark.parametrize(
    ("kind", "config", "key", "value"),
    [
        (GPT2Config, GPT2_CONFIG, "gpt2.attention.head_count", 0),
        (GPT2Config, GPT2_CONFIG, "gpt2.attention.head_count", 5),
        (GPT2Config, GPT2_CONFIG, "gpt2.attention.head_count_kv", 2),
        (GPT2Config, GPT2_CONFIG, "gpt2.attention.layer_norm_epsilon", None),
        (GPT2Config, GPT2_CONFIG, "gpt2.attention.layer_norm_epsilon", float("nan")),
        (GPT2Config, GPT2_CONFIG, "gpt2.block_count", 513),
        (LlamaConfig, LLAMA_CONFIG, "llama.block_count", 513),
        (LlamaConfig, LLAMA_CONFIG, "llama.attention.head_count", [4, 4]),
        (LlamaConfig, LLAMA_CONFIG, "llama.attention.head_count_kv", 0),
        (LlamaConfig, LLAMA_CONFIG, "llama.attention.head_count_kv", 3),
        (LlamaConfig, LLAMA_CONFIG, "llama.attention.value_length", 16),
        (LlamaConfig, LLAMA_CONFIG, "llama.attention.layer_norm_rms_epsilon", 0.0),
        (LlamaConfig, LLAMA_CONFIG, "llama.attention.scale", 0.5),
        (LlamaConfig, LLAMA_CONFIG, "llama.expert_count", 1025),
        (LlamaConfig, LLAMA_CONFIG, "llama.expert_used_count", 1),
        (LlamaConfig, MIXTRAL_CONFIG, "llama.expert_used_count", None),
        (LlamaConfig, MIXTRAL_CONFIG, "llama.expert_used_count", 9),
        (LlamaConfig, MIXTRAL_CONFIG, "llama.expert_shared_count", 1),
        (LlamaConfig, MIXTRAL_CONFIG, "llama.expert_group_count", 2),
        (LlamaConfig, LLAMA_CONFIG, "llama.rope.dimension_count", 31),
        (LlamaConfig, LLAMA_CONFIG, "llama.rope.dimension_count", 34),
        (LlamaConfig, LLAMA_CONFIG, "llama.rope.freq_base", float("inf")),
        (LlamaConfig, LLAMA_CONFIG, "llama.rope.scaling.type", "yarn"),
        (LlamaConfig, LLAMA_CONFIG, "llama.rope.scaling.type", 1),
    ],
)
def test_values_that_contradict(kind: type[Any], config: dict[str, Any], key: str, value: Any) -> None:
    with pytest.raises(ModelError, match=key.split(".")[-1]):
        kind.from_gguf(gguf_values(kind, config) | {key: value})


@pytest.mark.parametrize("metadata", [{}, {"general.architecture": 3}])
def test_no_architecture(metadata: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"general\.architecture is missing"):
        architecture_of_gguf(metadata)


def test_unknown_architecture_is_named() -> None:
    with pytest.raises(ModelError, match="'rwkv7' is not supported; known are gpt2, llama"):
        architecture_of_gguf({"general.architecture": "rwkv7"})


def test_every_class_name_finds_its_architecture() -> None:
    for item in ARCHITECTURES.values():
        for name in item.hf_names:
            assert architecture_of_config({"architectures": [name]}) is item


# ---- tensors


@pytest.mark.parametrize(("kind", "config"), CONFIGS)
def test_tensor_names_and_order_are_unique_and_complete(kind: type[Any], config: dict[str, Any]) -> None:
    architecture = architecture_of_config(config)
    parsed = kind.from_gguf(gguf_values(kind, config))
    rules = architecture.rules(parsed)
    assert len({rule.name for rule in rules}) == len(rules)
    tensors = {rule.name: SimpleNamespace(shape=rule.shape) for rule in rules if not rule.optional}
    architecture.check_tensors(parsed, tensors)
    for name in tensors:
        with pytest.raises(ModelError, match=f"tensor {name} is missing"):
            architecture.check_tensors(parsed, {key: tensors[key] for key in tensors if key != name})
        wrong = tensors | {name: SimpleNamespace(shape=(*tensors[name].shape, 2))}
        with pytest.raises(ModelError, match=f"tensor {name} has shape"):
            architecture.check_tensors(parsed, wrong)


def test_optional_tensors_are_checked_where_present() -> None:
    parsed = LlamaConfig.from_gguf(gguf_values(LlamaConfig, LLAMA_CONFIG))
    architecture = ARCHITECTURES["llama"]
    rules = {rule.name: rule for rule in architecture.rules(parsed)}
    optional = {name for name, rule in rules.items() if rule.optional}
    assert {"output.weight", "rope_freqs.weight", "blk.0.attn_q.bias", "blk.1.ffn_down.bias"} <= optional
    tensors = {name: SimpleNamespace(shape=rule.shape) for name, rule in rules.items() if not rule.optional}
    for name in optional:
        with pytest.raises(ModelError, match=f"tensor {name} has shape"):
            architecture.check_tensors(parsed, tensors | {name: SimpleNamespace(shape=(1, 1))})


@pytest.mark.parametrize("name", ["blk.0.attn_q_norm.weight", "blk.2.attn_q.weight", "mtp.weight"])
def test_a_tensor_that_would_be_ignored_is_refused(name: str) -> None:
    parsed = LlamaConfig.from_gguf(gguf_values(LlamaConfig, LLAMA_CONFIG))
    architecture = ARCHITECTURES["llama"]
    tensors = {rule.name: SimpleNamespace(shape=rule.shape) for rule in architecture.rules(parsed)}
    architecture.check_tensors(parsed, tensors)
    with pytest.raises(ModelError, match=f"tensor {name} is none that a llama model"):
        architecture.check_tensors(parsed, tensors | {name: SimpleNamespace(shape=(1,))})


# ---- real files


def test_the_stock_stories260k_is_accepted(shared_data: Path) -> None:
    with open_gguf(shared_data / "stories260K" / "stories260K-F32.gguf") as file:
        architecture = architecture_of_gguf(file.metadata)
        config = architecture.config.from_gguf(file.metadata)
        architecture.check_tensors(config, file.tensors)
    assert config == LlamaConfig(
        vocab_size=512,
        context_length=512,
        embedding_length=64,
        feed_forward_length=172,
        block_count=5,
        head_count=8,
        head_count_kv=4,
        head_dim=8,
        norm_epsilon=config.norm_epsilon,
        rope_dimension=8,
        rope=config.rope,
    )


# Wrong in the tokenizer's keys, which are not this module's to judge.
NOT_OURS = ("bos_id", "eos_id", "byte_token")


def test_impossible_models_are_refused(shared_data: Path) -> None:
    files = sorted((shared_data / "bad-gguf" / "model-level").glob("SEMREJECT_*.gguf"))
    ours = [path for path in files if not any(word in path.name for word in NOT_OURS)]
    assert len(ours) >= 11
    for path in ours:
        with open_gguf(path) as file, pytest.raises(ModelError):
            architecture = architecture_of_gguf(file.metadata)
            architecture.check_tensors(architecture.config.from_gguf(file.metadata), file.tensors)
