"""config.json as versions of transformers, and people, write it: read as transformers reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import LAYERS, LINEAR_ROPE, build, logits, save, tokens

import azquant
from azquant.architectures import ARCHITECTURES

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:sliding_window is:azquant.errors.ConversionWarning")

LINEAR = {"type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("name", "removed", "added"),
    [
        ("gptneox", ["rope_parameters"], {"rotary_pct": 0.5, "rotary_emb_base": 300}),
        ("gptneox", ["rope_parameters"], {"rotary_pct": 1.0, "rope_theta": 300.0, "rope_scaling": LINEAR}),
        ("smollm", ["rope_parameters"], {"rope_theta": 300.0, "rope_scaling": LINEAR}),
        ("smollm", ["rope_parameters"], {"rope_theta": 300.0, "rotary_emb_base": 20}),
        ("smollm", [], {"rope_scaling": {**LINEAR_ROPE, "factor": 2.0}}),
        ("smollm", [], {"rope_scaling": {}}),
        ("gemma3", ["rope_parameters"], {"rope_local_base_freq": 50.0, "rope_scaling": LINEAR}),
        ("phi3", ["rms_norm_eps"], {}),
        ("olmo2", ["rms_norm_eps"], {}),
        ("starcoder2", ["norm_epsilon"], {}),
        ("mistral", [], {"layer_types": LAYERS}),
        ("mistral", ["model_type"], {"model_type": "ministral", "layer_types": LAYERS}),
        ("mistral", [], {"sliding_window": None}),
    ],
)
def test_logits_are_those_of_transformers(
    tmp_path: Path, name: str, removed: list[str], added: dict[str, Any]
) -> None:
    folder = save(build(name), tmp_path / "hf")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in removed} | added))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    expected = logits(model, tokens(60))
    azquant.convert(folder, tmp_path / "model.gguf", "f32")
    found = azquant.load(tmp_path / "model.gguf", compute="fp32", kv_type="f32").logits(tokens(60))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("name", "epsilon"), [("phi3", 1e-5), ("olmo2", 1e-5), ("llama", 1e-6)])
def test_epsilon_that_is_not_said_is_that_of_transformers(name: str, epsilon: float) -> None:
    assert ARCHITECTURES[name].config.from_hf(_sizes()).norm_epsilon == epsilon


@pytest.mark.parametrize(
    ("said", "windows"),
    [
        ({}, (4096,) * 2),
        ({"sliding_window": None}, ()),
        ({"sliding_window": 8192}, ()),
        ({"sliding_window": 8}, (8, 8)),
    ],
)
def test_window_of_mistral(said: dict[str, Any], windows: tuple[int, ...]) -> None:
    config = ARCHITECTURES["llama"].config.from_hf(
        {**_sizes(), "architectures": ["MistralForCausalLM"], **said}
    )
    assert config.windows == windows


def _sizes() -> dict[str, Any]:
    return {
        "vocab_size": 32, "max_position_embeddings": 8192, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4,
    }  # fmt: skip
