"""examples/lora_az.py: the loss falls, the merged model has learned, llama.cpp takes the adapter."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

pytest.importorskip("torch")
pytest.importorskip("transformers")

from convert_support import llama_cpp


@pytest.fixture(scope="module")
def model_folder(shared_data: Path) -> Path:
    tiny = ROOT / "examples" / "az_llm_tiny"
    return tiny if (tiny / "model.safetensors").is_file() else shared_data / "az_llm_small"


def test_adapters_learn_and_reach_gguf_merged_and_alone(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("lora_az", ROOT / "examples" / "lora_az.py")
    assert spec is not None
    assert spec.loader is not None
    example: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    options = ["--model", str(model_folder), "--out", str(tmp_path), "--steps", "10", "--length", "32"]
    losses = example.main([*options, "--batch", "2"])
    assert max(losses[-3:]) < 0.75 * losses[0]
    shown = capsys.readouterr().out
    assert shown.count("Bu nədir?") == 2
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == 8
    request = {"prompt": "Sual: Göydə durar,", "n_predict": 12, "return_tokens": True, "ignore_eos": True}
    (base,) = llama_cpp(tmp_path / "base-q4_0.gguf", request)
    (adapted,) = llama_cpp(tmp_path / "base-q4_0.gguf", request, adapter=tmp_path / "adapter.gguf")
    assert adapted["tokens"] != base["tokens"]
