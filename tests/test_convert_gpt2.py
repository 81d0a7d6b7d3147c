"""GPT-2 checkpoints to GGUF: names, transposes, tied and separate heads, folded score scales."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_support import (
    GPT2_CONFIG,
    as_f32,
    gpt2_tensors,
    quantized,
    read_metadata,
    read_tensors,
    write_checkpoint,
)

from azquant.conversion import convert
from azquant.errors import ConversionError, ConversionWarning

pytestmark = pytest.mark.filterwarnings("ignore:.*tokenizer.*:azquant.errors.ConversionWarning")

GGUF_NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("h."):
        _, layer, part = stem.split(".", 2)
        return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def expected_tensors(tensors: dict[str, Any], prefix: str) -> dict[str, np.ndarray[Any, Any]]:
    """What the file must hold, written down independently of the rules under test."""
    return {
        "output.weight" if name == "lm_head.weight" else gguf_name(name.removeprefix(prefix)): (
            x.T if ".c_" in name and x.ndim == 2 else x
        )
        for name, x in tensors.items()
    }


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("tied", [True, False])
def test_f32_tensors_are_the_checkpoints_own(tmp_path: Path, prefix: str, tied: bool) -> None:
    config = {**GPT2_CONFIG, "tie_word_embeddings": tied}
    tensors = gpt2_tensors(config, prefix)
    out = tmp_path / "out.gguf"
    convert(write_checkpoint(tmp_path / "hf", config, tensors), out, "f32")
    found = read_tensors(out)
    expected = expected_tensors(tensors, prefix)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name] == (x.shape, "F32", np.ascontiguousarray(x).tobytes()), name


@pytest.mark.parametrize(
    ("tied", "embedding", "head"), [(True, "Q8_0", None), (False, "Q4_0", "Q8_0")], ids=["tied", "untied"]
)
def test_q4_0_types_and_bytes(tmp_path: Path, tied: bool, embedding: str, head: str | None) -> None:
    config = {**GPT2_CONFIG, "tie_word_embeddings": tied}
    tensors = gpt2_tensors(config)
    out = tmp_path / "out.gguf"
    report = convert(write_checkpoint(tmp_path / "hf", config, tensors), out, "q4_0")
    found = read_tensors(out)
    for name, x in expected_tensors(tensors, "transformer.").items():
        kind = "F32" if x.ndim == 1 or name == "position_embd.weight" else "Q4_0"
        kind = {"token_embd.weight": embedding, "output.weight": head}.get(name, kind) or "absent"
        assert found[name] == (x.shape, kind, quantized(np.ascontiguousarray(x), kind)), name
        row = next(row for row in report.tensors if row.name == name)
        assert row.type.upper() == kind
        assert bool(row.reason) == (kind != "Q4_0")
    assert ("output.weight" in found) == (head is not None)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_other_types_cover_every_matrix(tmp_path: Path, kind: str) -> None:
    config = {**GPT2_CONFIG, "tie_word_embeddings": False}
    tensors = gpt2_tensors(config)
    out = tmp_path / "out.gguf"
    convert(write_checkpoint(tmp_path / "hf", config, tensors), out, kind.lower())
    found = read_tensors(out)
    for name, x in expected_tensors(tensors, "transformer.").items():
        stays = x.ndim == 1 or name == "position_embd.weight"
        expected = quantized(np.ascontiguousarray(x), "F32" if stays else kind)
        assert found[name] == (x.shape, "F32" if stays else kind, expected), name


def test_metadata(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    convert(write_checkpoint(tmp_path / "my-gpt", GPT2_CONFIG, gpt2_tensors(GPT2_CONFIG)), out, "q4_0")
    found = read_metadata(out)
    expected = {
        "general.architecture": ("STRING", "gpt2"),
        "general.type": ("STRING", "model"),
        "general.name": ("STRING", "My Gpt"),
        "general.file_type": ("UINT32", 2),
        "general.quantization_version": ("UINT32", 2),
        "gpt2.vocab_size": ("UINT32", 96),
        "gpt2.context_length": ("UINT32", 16),
        "gpt2.embedding_length": ("UINT32", 64),
        "gpt2.feed_forward_length": ("UINT32", 160),
        "gpt2.block_count": ("UINT32", 2),
        "gpt2.attention.head_count": ("UINT32", 4),
        "gpt2.attention.layer_norm_epsilon": ("FLOAT32", np.float32(1e-5)),
    }
    assert {key: found.get(key) for key in expected} == expected


def test_n_inner_defaults_to_four_times_the_width(tmp_path: Path) -> None:
    config = {**GPT2_CONFIG, "n_inner": None}
    out = tmp_path / "out.gguf"
    convert(write_checkpoint(tmp_path / "hf", config, gpt2_tensors(config)), out, "f32")
    assert read_metadata(out)["gpt2.feed_forward_length"] == ("UINT32", 256)
    assert read_tensors(out)["blk.0.ffn_up.weight"][0] == (256, 64)


def test_old_configs_may_say_n_ctx(tmp_path: Path) -> None:
    config = {key: value for key, value in GPT2_CONFIG.items() if key != "n_positions"} | {"n_ctx": 16}
    out = tmp_path / "out.gguf"
    convert(write_checkpoint(tmp_path / "hf", config, gpt2_tensors(GPT2_CONFIG)), out, "f32")
    assert read_metadata(out)["gpt2.context_length"] == ("UINT32", 16)


def test_bare_gpt2model_ties_its_embedding(tmp_path: Path) -> None:
    config = {**GPT2_CONFIG, "architectures": ["GPT2Model"]}
    out = tmp_path / "out.gguf"
    convert(write_checkpoint(tmp_path / "hf", config, gpt2_tensors(config, prefix="")), out, "q4_0")
    assert "output.weight" not in read_tensors(out)
    assert read_tensors(out)["token_embd.weight"][1] == "Q8_0"


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_equal_to_the_embedding_is_stored_once(tmp_path: Path, tied: bool) -> None:
    tensors = gpt2_tensors(GPT2_CONFIG)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
    out = tmp_path / "out.gguf"
    folder = write_checkpoint(tmp_path / "hf", {**GPT2_CONFIG, "tie_word_embeddings": tied}, tensors)
    report = convert(folder, out, "f32")
    assert "output.weight" not in read_tensors(out)
    assert any("stored once" in note for note in report.notes)


def test_a_tied_head_that_differs_is_kept_with_a_warning(tmp_path: Path) -> None:
    tensors = gpt2_tensors(GPT2_CONFIG)
    head = tensors["transformer.wte.weight"].copy()
    head[-1, -1] += 1  # only the very last weight differs
    tensors["lm_head.weight"] = head
    out = tmp_path / "out.gguf"
    with pytest.warns(ConversionWarning, match=r"lm_head\.weight differs"):
        report = convert(write_checkpoint(tmp_path / "hf", GPT2_CONFIG, tensors), out, "f32")
    assert any("lm_head.weight differs" in text for text in report.warnings)
    assert np.array_equal(as_f32(out, "output.weight"), head)


def test_a_tied_matrix_may_be_saved_under_the_heads_name(tmp_path: Path) -> None:
    tensors = gpt2_tensors(GPT2_CONFIG)
    matrix = tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    out = tmp_path / "out.gguf"
    convert(write_checkpoint(tmp_path / "hf", GPT2_CONFIG, tensors), out, "f32")
    assert np.array_equal(as_f32(out, "token_embd.weight"), matrix)
    assert "output.weight" not in read_tensors(out)


def test_causal_mask_buffers_are_left_out(tmp_path: Path) -> None:
    tensors = gpt2_tensors(GPT2_CONFIG)
    for i in range(2):
        tensors[f"transformer.h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.uint8))
        tensors[f"transformer.h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
    out = tmp_path / "out.gguf"
    convert(write_checkpoint(tmp_path / "hf", GPT2_CONFIG, tensors), out, "f32")
    assert len(read_tensors(out)) == 4 + 2 * 12


@pytest.mark.parametrize(
    "name", ["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh", "gelu_accurate"]
)
def test_every_name_of_tanh_gelu_is_accepted(tmp_path: Path, name: str) -> None:
    config = {**GPT2_CONFIG, "activation_function": name}
    folder = write_checkpoint(tmp_path / "hf", config, gpt2_tensors(config))
    assert convert(folder, tmp_path / "out.gguf", "f32", dry_run=True).architecture == "gpt2"


@pytest.mark.parametrize("name", ["silu", "quick_gelu", "gelu_10"])
def test_another_activation_is_refused_by_name(tmp_path: Path, name: str) -> None:
    config = {**GPT2_CONFIG, "activation_function": name}
    folder = write_checkpoint(tmp_path / "hf", config, gpt2_tensors(config))
    with pytest.raises(ConversionError, match=f"activation_function is '{name}'"):
        convert(folder, tmp_path / "out.gguf", "f32")


def test_cross_attention_is_refused(tmp_path: Path) -> None:
    config = {**GPT2_CONFIG, "add_cross_attention": True}
    folder = write_checkpoint(tmp_path / "hf", config, gpt2_tensors(config))
    with pytest.raises(ConversionError, match="add_cross_attention"):
        convert(folder, tmp_path / "out.gguf", "f32")


@pytest.mark.parametrize(
    ("flags", "factors"),
    [
        ({"scale_attn_weights": False}, (4.0, 4.0)),
        ({"scale_attn_by_inverse_layer_idx": True}, (1.0, 0.5)),
        ({"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}, (4.0, 2.0)),
        ({"reorder_and_upcast_attn": True}, (1.0, 1.0)),
    ],
    ids=["no head scale", "layer scale", "both", "upcast"],
)
def test_score_scales_are_folded_into_the_query_rows(
    tmp_path: Path, flags: dict[str, bool], factors: tuple[float, float]
) -> None:
    config = {**GPT2_CONFIG, **flags}
    tensors = gpt2_tensors(config)
    out = tmp_path / "out.gguf"
    report = convert(write_checkpoint(tmp_path / "hf", config, tensors), out, "f32")
    for i, factor in enumerate(factors):
        for kind in ("weight", "bias"):
            source = tensors[f"transformer.h.{i}.attn.c_attn.{kind}"].T.copy()
            source[:64] *= np.float32(factor)  # the queries come first
            assert np.array_equal(as_f32(out, f"blk.{i}.attn_qkv.{kind}"), source)
    assert bool(report.notes) == (set(factors) != {1.0})


def test_folding_is_bounded_by_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factor must stop at the last query row wherever the bands are cut."""
    from azquant.conversion import write

    config = {**GPT2_CONFIG, "scale_attn_weights": False}
    folder = write_checkpoint(tmp_path / "hf", config, gpt2_tensors(config))
    convert(folder, tmp_path / "whole.gguf", "f32")
    for rows in (1, 5, 63, 64, 65):
        monkeypatch.setattr(write, "BAND_ELEMENTS", rows * 64)
        convert(folder, tmp_path / f"{rows}.gguf", "f32")
        assert read_tensors(tmp_path / f"{rows}.gguf") == read_tensors(tmp_path / "whole.gguf")


def test_odd_head_size_needs_an_inexact_factor(tmp_path: Path) -> None:
    config = {**GPT2_CONFIG, "n_head": 2, "scale_attn_weights": False}
    tensors = gpt2_tensors(config)
    out = tmp_path / "out.gguf"
    convert(write_checkpoint(tmp_path / "hf", config, tensors), out, "f32")
    source = tensors["transformer.h.0.attn.c_attn.bias"][:64] * np.float32(math.sqrt(32))
    assert np.array_equal(as_f32(out, "blk.0.attn_qkv.bias")[:64], source)


def test_transformers_own_checkpoint(tmp_path: Path) -> None:
    """What save_pretrained writes today: every name used, none left, each tensor where it belongs."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=96,
        n_positions=16,
        n_embd=64,
        n_head=4,
        n_layer=2,
        n_inner=100,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "hf")
    out = tmp_path / "out.gguf"
    convert(tmp_path / "hf", out, "f32")
    state = {name: x.numpy() for name, x in model.transformer.state_dict().items()}
    expected = expected_tensors(state, "")
    found = read_tensors(out)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name] == (x.shape, "F32", np.ascontiguousarray(x).tobytes()), name
