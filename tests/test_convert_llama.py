"""Llama checkpoints to GGUF: RoPE permutation and scaling, grouped queries, biases, kinds of heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_support import (
    LLAMA_CONFIG,
    Tensors,
    as_f32,
    llama_tensors,
    quantized,
    read_metadata,
    read_tensors,
    write_checkpoint,
)

from azquant.conversion import convert
from azquant.errors import ConversionError

pytestmark = pytest.mark.filterwarnings("ignore:.*tokenizer.*:azquant.errors.ConversionWarning")

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(x: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Row 2i of a head from its row i, row 2i + 1 from its row i + half: one row at a time, on purpose."""
    size = x.shape[0] // heads
    out = np.empty_like(x)
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = x[head * size + i]
            out[head * size + 2 * i + 1] = x[head * size + i + size // 2]
    return out


def expected_tensors(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """What the file must hold, written down independently of the rules under test."""
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    expected = {}
    for name, x in tensors.items():
        if name in fixed:
            expected[fixed[name]] = x
            continue
        _, _, layer, rest = name.split(".", 3)
        part, kind = rest.rsplit(".", 1)
        if part == "self_attn.q_proj":
            x = interleaved(x, config["num_attention_heads"])
        if part == "self_attn.k_proj":
            x = interleaved(x, config["num_key_value_heads"])
        expected[f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"] = x
    return expected


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4, "head_dim": None},
        {"num_key_value_heads": 1},
        {"attention_bias": True},
        {"mlp_bias": True},
    ],
    ids=["gqa", "tied", "mha", "mqa", "attention bias", "mlp bias"],
)
def test_f32_tensors(tmp_path: Path, change: dict[str, Any]) -> None:
    config = {**LLAMA_CONFIG, **change}
    tensors = llama_tensors(config)
    out = tmp_path / "out.gguf"
    convert(write_checkpoint(tmp_path / "hf", config, tensors), out, "f32")
    found = read_tensors(out)
    expected = expected_tensors(tensors, config)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name] == (x.shape, "F32", np.ascontiguousarray(x).tobytes()), name


def test_q4_0_types_and_bytes(tmp_path: Path) -> None:
    tensors = llama_tensors(LLAMA_CONFIG)
    out = tmp_path / "out.gguf"
    convert(write_checkpoint(tmp_path / "hf", LLAMA_CONFIG, tensors), out, "q4_0")
    found = read_tensors(out)
    for name, x in expected_tensors(tensors, LLAMA_CONFIG).items():
        kind = "F32" if x.ndim == 1 else "Q8_0" if name == "output.weight" else "Q4_0"
        assert found[name] == (x.shape, kind, quantized(np.ascontiguousarray(x), kind)), name


def test_permutation_does_not_depend_on_the_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from azquant.conversion import write

    folder = write_checkpoint(tmp_path / "hf", LLAMA_CONFIG, llama_tensors(LLAMA_CONFIG))
    convert(folder, tmp_path / "whole.gguf", "f32")
    for rows in (1, 31, 32, 33, 70):
        monkeypatch.setattr(write, "BAND_ELEMENTS", rows * 64)
        convert(folder, tmp_path / f"{rows}.gguf", "f32")
        assert read_tensors(tmp_path / f"{rows}.gguf") == read_tensors(tmp_path / "whole.gguf")


def test_metadata(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    convert(write_checkpoint(tmp_path / "hf", LLAMA_CONFIG, llama_tensors(LLAMA_CONFIG)), out, "q8_0")
    found = read_metadata(out)
    expected = {
        "general.architecture": ("STRING", "llama"),
        "general.file_type": ("UINT32", 7),
        "llama.vocab_size": ("UINT32", 96),
        "llama.context_length": ("UINT32", 32),
        "llama.embedding_length": ("UINT32", 64),
        "llama.feed_forward_length": ("UINT32", 96),
        "llama.block_count": ("UINT32", 2),
        "llama.attention.head_count": ("UINT32", 4),
        "llama.attention.head_count_kv": ("UINT32", 2),
        "llama.attention.key_length": ("UINT32", 32),
        "llama.attention.value_length": ("UINT32", 32),
        "llama.attention.layer_norm_rms_epsilon": ("FLOAT32", np.float32(1e-5)),
        "llama.rope.dimension_count": ("UINT32", 32),
        "llama.rope.freq_base": ("FLOAT32", 10000.0),
    }
    assert {key: found.get(key) for key in expected} == expected
    assert not [key for key in found if "rope.scaling" in key]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_theta": 5e5, "rope_scaling": None},
    ],
    ids=["transformers 4", "transformers 5", "null scaling"],
)
def test_rope_base(tmp_path: Path, rope: dict[str, Any]) -> None:
    config = {**LLAMA_CONFIG, **rope}
    out = tmp_path / "out.gguf"
    convert(write_checkpoint(tmp_path / "hf", config, llama_tensors(config)), out, "f32")
    assert read_metadata(out)["llama.rope.freq_base"] == ("FLOAT32", 5e5)


@pytest.mark.parametrize("type_key", ["type", "rope_type"])
def test_linear_rope_scaling_becomes_keys(tmp_path: Path, type_key: str) -> None:
    config = {**LLAMA_CONFIG, "rope_scaling": {type_key: "linear", "factor": 4.0}}
    out = tmp_path / "out.gguf"
    convert(write_checkpoint(tmp_path / "hf", config, llama_tensors(config)), out, "f32")
    found = read_metadata(out)
    assert found["llama.rope.scaling.type"] == ("STRING", "linear")
    assert found["llama.rope.scaling.factor"] == ("FLOAT32", 4.0)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_llama3_rope_scaling_becomes_a_tensor(tmp_path: Path) -> None:
    """Frequencies divided by the tensor are the ones transformers turns with."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = {**LLAMA_CONFIG, "rope_scaling": LLAMA3, "max_position_embeddings": 512}
    out = tmp_path / "out.gguf"
    report = convert(write_checkpoint(tmp_path / "hf", config, llama_tensors(config)), out, "q4_0")
    divisors = as_f32(out, "rope_freqs.weight")
    plain = 10000.0 ** -(np.arange(0, 32, 2) / 32)
    reference = transformers.LlamaConfig(
        **{key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")},
        rope_parameters={**LLAMA3, "rope_theta": 10000.0},
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](reference, device="cpu")
    np.testing.assert_allclose(plain / divisors, expected.numpy(), rtol=1e-5)
    assert divisors.min() == 1 and divisors.max() == 8 and len(set(divisors.tolist())) > 3
    assert any("rope_freqs" in note for note in report.notes)


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope", "something-new"])
def test_other_rope_scaling_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    config = {**LLAMA_CONFIG, "rope_scaling": {"rope_type": kind, "factor": 2.0}}
    folder = write_checkpoint(tmp_path / "hf", config, llama_tensors(config))
    with pytest.raises(ConversionError, match=f"rope_scaling.*'{kind}'"):
        convert(folder, tmp_path / "out.gguf", "f32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"rope_scaling": {**LLAMA3, "factor": None}}, "factor is missing"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor 4.0 is not below"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', not an object"),
        ({"head_dim": 33}, "head size is 33"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"head_dim": None, "num_attention_heads": 6}, "hidden_size 64 is not a multiple"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ],
)
def test_impossible_or_unsupported_config_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = write_checkpoint(tmp_path / "hf", {**LLAMA_CONFIG, **change}, llama_tensors(LLAMA_CONFIG))
    with pytest.raises(ConversionError, match=message):
        convert(folder, tmp_path / "out.gguf", "f32")
    assert not (tmp_path / "out.gguf").exists()


def test_pretraining_tp_and_inv_freq_buffers_are_harmless(tmp_path: Path) -> None:
    config = {**LLAMA_CONFIG, "pretraining_tp": 2}
    tensors = llama_tensors(config)
    plain = len(tensors)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16, np.float32)
    tensors["model.rotary_emb.inv_freq"] = np.ones(16, np.float32)
    out = tmp_path / "out.gguf"
    convert(write_checkpoint(tmp_path / "hf", config, tensors), out, "f32")
    assert len(read_tensors(out)) == plain


def test_a_bias_the_config_denies_is_refused(tmp_path: Path) -> None:
    tensors = llama_tensors({**LLAMA_CONFIG, "attention_bias": True})
    folder = write_checkpoint(tmp_path / "hf", LLAMA_CONFIG, tensors)
    with pytest.raises(ConversionError, match=r"q_proj\.bias.* would be dropped"):
        convert(folder, tmp_path / "out.gguf", "f32")


def test_untied_config_without_a_head_is_refused(tmp_path: Path) -> None:
    tensors = llama_tensors(LLAMA_CONFIG)
    del tensors["lm_head.weight"]
    folder = write_checkpoint(tmp_path / "hf", LLAMA_CONFIG, tensors)
    with pytest.raises(ConversionError, match=r"lm_head\.weight is missing"):
        convert(folder, tmp_path / "out.gguf", "f32")


def test_silent_config_without_a_head_is_tied(tmp_path: Path) -> None:
    config = {key: value for key, value in LLAMA_CONFIG.items() if key != "tie_word_embeddings"}
    tensors = llama_tensors(config)
    del tensors["lm_head.weight"]
    out = tmp_path / "out.gguf"
    convert(write_checkpoint(tmp_path / "hf", config, tensors), out, "q4_0")
    assert read_tensors(out)["token_embd.weight"][1] == "Q8_0"


def test_transformers_own_checkpoint(tmp_path: Path) -> None:
    """What save_pretrained writes today: every name used, none left, each tensor where it belongs."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    names = ("architectures", "model_type", "rope_theta")
    config = {**LLAMA_CONFIG, "attention_bias": True, "mlp_bias": True}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{key: value for key, value in config.items() if key not in names})
    )
    for parameter in model.parameters():  # biases start as zeros, which would hide a permutation
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "hf")
    out = tmp_path / "out.gguf"
    convert(tmp_path / "hf", out, "f32")
    expected = expected_tensors({name: x.numpy() for name, x in model.state_dict().items()}, config)
    found = read_tensors(out)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name] == (x.shape, "F32", np.ascontiguousarray(x).tobytes()), name


# ---- stories260K, a real model in three formats


def test_stories260k_from_both_formats_is_the_stock_file(shared_data: Path, tmp_path: Path) -> None:
    stock = read_tensors(shared_data / "stories260K" / "stories260K-F32.gguf")
    assert stock.pop("output.weight")[2] == stock["token_embd.weight"][2]  # the stock file stores it twice
    hf = shared_data / "stories260K" / "hf"
    for kind in ("model.safetensors", "pytorch_model.bin"):
        folder = tmp_path / kind
        folder.mkdir()
        for name in ("config.json", kind):
            (folder / name).symlink_to(hf / name)
        convert(folder, tmp_path / f"{kind}.gguf", "f32")
        assert read_tensors(tmp_path / f"{kind}.gguf") == stock


def test_stories260k_q4_0_falls_back_where_rows_do_not_fit(shared_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.warns(match="rows of 172 are no whole number of q4_0 blocks"):
        report = convert(shared_data / "stories260K" / "hf", out, "q4_0")
    assert {row.name: row.type for row in report.fallbacks if len(row.shape) > 1} == {
        "token_embd.weight": "q8_0",
        **{f"blk.{i}.ffn_down.weight": "f16" for i in range(5)},
    }
