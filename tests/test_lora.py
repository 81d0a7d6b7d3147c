"""LoRA adapters: merged in float32 before quantizing, as PEFT itself merges them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_support import (
    GPT2_CONFIG,
    LLAMA_CONFIG,
    as_f32,
    gpt2_tensors,
    llama_tensors,
    quantized,
    read_tensors,
    write_checkpoint,
)
from safetensors.numpy import load_file, save_file
from tiny_models import build, logits, save, tokens

import azquant
from azquant.conversion import convert
from azquant.errors import AzquantError, ConversionError, InputFileError

pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer:azquant.errors.ConversionWarning")

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 6,
    "bias": "none",
    "fan_in_fan_out": False,
}


def write_adapter(
    folder: Path, shapes: dict[str, tuple[int, int]], *, rank: int = 4, **config: Any
) -> dict[str, np.ndarray[Any, Any]]:
    """An adapter as PEFT saves it; ``shapes`` are (out, in). Gives each module's B · A in float64."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(5)
    tensors, products = {}, {}
    for module, (rows, columns) in shapes.items():
        a = random.standard_normal((rank, columns), dtype=np.float32)
        b = random.standard_normal((rows, rank), dtype=np.float32)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        products[module] = b.astype(np.float64) @ a
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}), encoding="utf-8")
    return products


GATE = "model.layers.1.mlp.gate_proj"
C_FC = "transformer.h.0.mlp.c_fc"


@pytest.mark.parametrize(
    ("change", "scale"),
    [
        ({}, 6 / 4),
        ({"use_rslora": True}, 6 / 2),
        ({"lora_alpha": 1, "alpha_pattern": {"mlp.gate_proj": 3}}, 3 / 4),
        ({"r": 8, "rank_pattern": {r"layers\.1\..*": 4}}, 6 / 4),
        ({"use_dora": False, "modules_to_save": None}, 6 / 4),
    ],
    ids=["plain", "rslora", "alpha pattern", "rank pattern", "off"],
)
def test_linear(tmp_path: Path, change: dict[str, Any], scale: float) -> None:
    tensors = llama_tensors(LLAMA_CONFIG)
    folder = write_checkpoint(tmp_path / "hf", LLAMA_CONFIG, tensors)
    products = write_adapter(tmp_path / "lora", {GATE: (96, 64)}, **change)
    report = convert(folder, tmp_path / "out.gguf", "f32", lora=tmp_path / "lora")
    expected = tensors[f"{GATE}.weight"] + scale * products[GATE]
    np.testing.assert_allclose(
        as_f32(tmp_path / "out.gguf", "blk.1.ffn_gate.weight"), expected, rtol=0, atol=1e-5
    )
    convert(folder, tmp_path / "plain.gguf", "f32")
    merged, plain = read_tensors(tmp_path / "out.gguf"), read_tensors(tmp_path / "plain.gguf")
    assert {name for name in plain if merged[name] != plain[name]} == {"blk.1.ffn_gate.weight"}
    assert any("LoRA" in note for note in report.notes)


def test_merging_comes_before_quantizing(tmp_path: Path) -> None:
    tensors = llama_tensors(LLAMA_CONFIG)
    folder = write_checkpoint(tmp_path / "hf", LLAMA_CONFIG, tensors)
    write_adapter(tmp_path / "lora", {GATE: (96, 64)})
    for kind in ("f32", "q4_0"):
        convert(folder, tmp_path / f"{kind}.gguf", kind, lora=tmp_path / "lora")
    merged = as_f32(tmp_path / "f32.gguf", "blk.1.ffn_gate.weight")
    assert read_tensors(tmp_path / "q4_0.gguf")["blk.1.ffn_gate.weight"][2] == quantized(merged, "Q4_0")


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_conv1d_of_gpt2(tmp_path: Path, prefix: str) -> None:
    """fan_in_fan_out: the checkpoint holds (in, out)."""
    tensors = gpt2_tensors(GPT2_CONFIG, prefix)
    folder = write_checkpoint(tmp_path / "hf", GPT2_CONFIG, tensors)
    products = write_adapter(tmp_path / "lora", {C_FC: (160, 64)}, fan_in_fan_out=True)
    convert(folder, tmp_path / "out.gguf", "f32", lora=tmp_path / "lora")
    expected = tensors[f"{prefix}h.0.mlp.c_fc.weight"].T + 1.5 * products[C_FC]
    np.testing.assert_allclose(
        as_f32(tmp_path / "out.gguf", "blk.0.ffn_up.weight"), expected, rtol=0, atol=1e-5
    )


def test_merging_does_not_depend_on_the_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from azquant.conversion import write

    folder = write_checkpoint(tmp_path / "hf", LLAMA_CONFIG, llama_tensors(LLAMA_CONFIG))
    query = "model.layers.0.self_attn.q_proj"  # its rows are reordered on the way
    products = write_adapter(tmp_path / "lora", {query: (128, 64)})
    for rows in (1, 33, 4096):
        monkeypatch.setattr(write, "BAND_ELEMENTS", rows * 64)
        out = tmp_path / f"{rows}.gguf"
        convert(folder, out, "f32", lora=tmp_path / "lora")
        merged = llama_tensors(LLAMA_CONFIG)[f"{query}.weight"] + 1.5 * products[query]
        interleaved = merged.reshape(4, 2, 16, 64).swapaxes(1, 2).reshape(128, 64)
        np.testing.assert_allclose(as_f32(out, "blk.0.attn_q.weight"), interleaved, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is set"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x', not a number"),
        ({"r": 8}, "rank of .* is 8, but its matrices have rank 4"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
    ],
)
def test_what_cannot_be_merged_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = write_checkpoint(tmp_path / "hf", LLAMA_CONFIG, llama_tensors(LLAMA_CONFIG))
    write_adapter(tmp_path / "lora", {GATE: (96, 64)}, **change)
    with pytest.raises(ConversionError, match=message):
        convert(folder, tmp_path / "out.gguf", lora=tmp_path / "lora")
    assert not (tmp_path / "out.gguf").exists()


def test_a_product_of_another_shape(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", LLAMA_CONFIG, llama_tensors(LLAMA_CONFIG))
    write_adapter(tmp_path / "lora", {GATE: (64, 96)})
    with pytest.raises(ConversionError, match=r"by 64 x 96, but .* has shape 96 x 64"):
        convert(folder, tmp_path / "out.gguf", lora=tmp_path / "lora")


def test_a_base_layer_without_a_pair(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", LLAMA_CONFIG, llama_tensors(LLAMA_CONFIG))
    write_adapter(tmp_path / "lora", {GATE: (96, 64)})
    path = tmp_path / "lora" / "adapter_model.safetensors"
    more = {"base_model.model.lm_head.base_layer.weight": np.ones((4, 64), np.float32)}
    save_file({**load_file(path), **more}, path)
    with pytest.raises(ConversionError, match=r"lm_head has a base_layer, but no LoRA"):
        convert(folder, tmp_path / "out.gguf", lora=tmp_path / "lora")


def test_a_module_the_model_does_not_have(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", LLAMA_CONFIG, llama_tensors(LLAMA_CONFIG))
    write_adapter(tmp_path / "lora", {"model.layers.9.mlp.gate_proj": (96, 64)})
    with pytest.raises(ConversionError, match=r"changes model\.layers\.9.*does not have"):
        convert(folder, tmp_path / "out.gguf", lora=tmp_path / "lora")


@pytest.mark.parametrize(
    "name", ["base_model.model.x.lora_A.weight", "base_model.model.x.lora_magnitude_vector", "x.weight"]
)
def test_tensors_that_are_no_pair(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "hf", LLAMA_CONFIG, llama_tensors(LLAMA_CONFIG))
    write_adapter(tmp_path / "lora", {})
    save_file({name: np.ones((4, 64), np.float32)}, tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(ConversionError, match=r"only one of lora_A and lora_B|no pair of LoRA"):
        convert(folder, tmp_path / "out.gguf", lora=tmp_path / "lora")


def test_a_folder_that_is_no_adapter(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", LLAMA_CONFIG, llama_tensors(LLAMA_CONFIG))
    with pytest.raises(InputFileError, match=r"adapter_config\.json"):
        convert(folder, tmp_path / "out.gguf", lora=folder)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    with pytest.raises(AzquantError, match=r"adapter_model\.safetensors"):
        convert(folder, tmp_path / "out.gguf", lora=tmp_path / "lora")


@pytest.mark.parametrize(
    ("name", "modules", "more"),
    [
        ("gpt2", ["c_attn", "c_fc", "wte"], {"fan_in_fan_out": True}),
        ("gpt2", ["c_attn", "c_fc", "wte"], {}),
        ("gpt2", ["attn.c_proj", "lm_head"], {}),  # a square Conv1D; fan_in_fan_out is saved as false
        ("gpt2", ["attn.c_proj", "lm_head"], {"fan_in_fan_out": True}),
        ("gpt2", ["wte"], {"ensure_weight_tying": True}),
        ("smollm", ["embed_tokens", "lm_head"], {"ensure_weight_tying": True}),
        ("smollm", ["lm_head", "q_proj"], {}),
        ("llama", ["embed_tokens", "lm_head"], {}),
        ("llama", ["q_proj", "down_proj"], {"init_lora_weights": "orthogonal"}),
        ("gptneox", ["query_key_value"], {"use_rslora": True}),
    ],
)
@pytest.mark.parametrize("with_base", ["auto", False])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")
def test_pefts_own_adapter(
    tmp_path: Path, name: str, modules: list[str], more: dict[str, Any], with_base: Any
) -> None:
    """What peft saves gives the logits of the model that peft makes of it."""
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    model = build(name)
    save(model, tmp_path / "hf")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=modules, **more)
    adapted = peft.get_peft_model(model, config)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)
    adapted.save_pretrained(tmp_path / "lora", save_embedding_layers=with_base)
    again = peft.PeftModel.from_pretrained(build(name), tmp_path / "lora")
    expected = logits(again.eval(), tokens(20))
    azquant.convert(tmp_path / "hf", tmp_path / "out.gguf", "f32", lora=tmp_path / "lora")
    found = azquant.load(tmp_path / "out.gguf", compute="fp32", kv_type="f32").logits(tokens(20))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.abs(logits(build(name), tokens(20)) - expected).max() > 0.1  # the adapter did something
