"""Everything a conversion refuses: one test per refusal, each leaving no file behind."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_support import (
    GPT2_CONFIG,
    LLAMA_CONFIG,
    Tensors,
    gpt2_tensors,
    llama_tensors,
    write_checkpoint,
    write_sharded,
)

from azquant.conversion import convert
from azquant.errors import (
    AzquantError,
    CheckpointError,
    ConversionError,
    InputFileError,
    NonFiniteError,
    OutputError,
    UnsupportedArchitectureError,
    UnsupportedTypeError,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer:azquant.errors.ConversionWarning")


def refused(
    tmp_path: Path,
    error: type[AzquantError],
    match: str,
    config: dict[str, Any] | None = None,
    tensors: Tensors | None = None,
    kind: str = "q4_0",
) -> AzquantError:
    """Convert a GPT-2 that is wrong in one way: ``error`` with a one-line message, and no output."""
    config = GPT2_CONFIG if config is None else config
    folder = write_checkpoint(
        tmp_path / "hf", config, gpt2_tensors(GPT2_CONFIG) if tensors is None else tensors
    )
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=match) as caught:
        convert(folder, tmp_path / "out.gguf", kind)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    return caught.value


# ---- config.json


def test_missing_config(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", None, gpt2_tensors(GPT2_CONFIG))
    with pytest.raises(ConversionError, match=r"there is no config\.json"):
        convert(folder, tmp_path / "out.gguf")


def test_unknown_architecture_is_named_with_the_known_ones(tmp_path: Path) -> None:
    config = {**GPT2_CONFIG, "architectures": ["BertForMaskedLM"]}
    error = refused(tmp_path, UnsupportedArchitectureError, "BertForMaskedLM is not supported", config)
    assert "GPT2LMHeadModel" in str(error) and "LlamaForCausalLM" in str(error)


def test_unknown_model_type_is_named(tmp_path: Path) -> None:
    config = {**GPT2_CONFIG, "architectures": None, "model_type": "rwkv"}
    refused(tmp_path, UnsupportedArchitectureError, "architecture rwkv is not supported", config)


def test_neither_architectures_nor_model_type(tmp_path: Path) -> None:
    config = {key: value for key, value in GPT2_CONFIG.items() if key not in ("architectures", "model_type")}
    refused(tmp_path, ConversionError, "neither architectures nor model_type", config)


@pytest.mark.parametrize("architectures", [None, []])
def test_model_type_stands_in_for_architectures(tmp_path: Path, architectures: Any) -> None:
    folder = write_checkpoint(
        tmp_path / "hf", {**GPT2_CONFIG, "architectures": architectures}, gpt2_tensors(GPT2_CONFIG)
    )
    assert convert(folder, tmp_path / "out.gguf").architecture == "gpt2"


def test_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    config = {**GPT2_CONFIG, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    refused(tmp_path, ConversionError, "quantization_config", config)


@pytest.mark.parametrize("key", ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"])
def test_a_missing_size_is_named(tmp_path: Path, key: str) -> None:
    config = {name: value for name, value in GPT2_CONFIG.items() if name != key}
    refused(tmp_path, ConversionError, f"{key}.* is missing", config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n_embd", 0, "n_embd is 0, outside 1 to"),
        ("n_embd", -64, "n_embd is -64, outside"),
        ("n_embd", "64", "n_embd is '64', not an integer"),
        ("n_embd", 64.0, "n_embd is 64.0, not an integer"),
        ("n_embd", True, "n_embd is True, not an integer"),
        ("n_embd", [64], r"n_embd is \[64\], not an integer"),
        ("n_layer", 513, "n_layer is 513, outside 1 to 512"),
        ("n_head", 5, "n_embd 64 is not a multiple of n_head 5"),
        ("num_attention_heads", 2, "n_head is 4, but num_attention_heads 2"),
        ("n_inner", 0, "n_inner is 0"),
        ("vocab_size", 2**31, "vocab_size is 2147483648, outside"),
        ("n_positions", 10**30, "n_positions is 1000000000000000000000000000000, outside"),
        ("layer_norm_epsilon", 0, "layer_norm_epsilon is 0, not a finite number above zero"),
        ("layer_norm_epsilon", "1e-5", "layer_norm_epsilon is '1e-5', not a number"),
        ("layer_norm_epsilon", 10**400, "layer_norm_epsilon is .*, not a finite number"),
        ("scale_attn_weights", 1, "scale_attn_weights is 1, not true or false"),
        ("activation_function", ["gelu_new"], "activation_function is .*, not a string"),
        ("tie_word_embeddings", "x" * 500, r"tie_word_embeddings is 'x{50,60}\.\.\., not true or false"),
    ],
)
def test_impossible_values_are_named(tmp_path: Path, key: str, value: Any, message: str) -> None:
    folder = write_checkpoint(tmp_path / "hf", GPT2_CONFIG, gpt2_tensors(GPT2_CONFIG))
    config = {**GPT2_CONFIG, key: value}
    if isinstance(value, int) and value > 10**40:  # json readers bound the digits of integers before
        from azquant.architectures import GPT2Config

        with pytest.raises(ConversionError, match=message):
            GPT2Config.from_hf(config)
        return
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConversionError, match=message):
        convert(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_json_that_is_no_number(tmp_path: Path, value: str) -> None:
    """Python's json reads these words; an epsilon of them would make every output NaN."""
    folder = write_checkpoint(tmp_path / "hf", GPT2_CONFIG, gpt2_tensors(GPT2_CONFIG))
    text = json.dumps(GPT2_CONFIG).replace("1e-05", value)
    assert value in text
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises((ConversionError, CheckpointError)):
        convert(folder, tmp_path / "out.gguf")


# ---- tensors


@pytest.mark.parametrize(
    "name", ["wte.weight", "wpe.weight", "ln_f.bias", "h.1.attn.c_attn.bias", "h.0.mlp.c_proj.weight"]
)
def test_a_missing_tensor_is_named_with_its_file(tmp_path: Path, name: str) -> None:
    tensors = gpt2_tensors(GPT2_CONFIG)
    del tensors[f"transformer.{name}"]
    message = rf"transformer\.{name} is missing from model\.safetensors"
    refused(tmp_path, ConversionError, message, tensors=tensors)


def test_an_unknown_tensor_is_never_dropped(tmp_path: Path) -> None:
    tensors = gpt2_tensors(GPT2_CONFIG)
    tensors["transformer.h.0.attn.q_norm.weight"] = np.ones(16, np.float32)
    refused(
        tmp_path,
        ConversionError,
        r"transformer\.h\.0\.attn\.q_norm\.weight would be dropped",
        tensors=tensors,
    )


def test_more_layers_than_the_config_has(tmp_path: Path) -> None:
    message = r"h\.1\..* and 9 more would be dropped"
    refused(tmp_path, ConversionError, message, config={**GPT2_CONFIG, "n_layer": 1})


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    tensors = gpt2_tensors(GPT2_CONFIG)
    tensors["wte.weight"] = tensors["transformer.wte.weight"].copy()
    refused(tmp_path, ConversionError, r"wte\.weight and transformer\.wte\.weight", tensors=tensors)


@pytest.mark.parametrize(
    ("name", "shape", "found", "expected"),
    [
        ("wte.weight", (97, 64), "97 x 64", "96 x 64"),
        ("h.0.attn.c_attn.weight", (192, 64), "192 x 64", "64 x 192"),  # a Linear where a Conv1D belongs
        ("h.0.attn.c_attn.bias", (64,), "64", "192"),
        ("h.1.mlp.c_fc.weight", (64, 256), "64 x 256", "64 x 160"),
        ("ln_f.weight", (64, 1), "64 x 1", "64"),
        ("ln_f.bias", (), "scalar", "64"),
    ],
)
def test_a_shape_against_the_config_is_named(
    tmp_path: Path, name: str, shape: tuple[int, ...], found: str, expected: str
) -> None:
    tensors = gpt2_tensors(GPT2_CONFIG)
    tensors[f"transformer.{name}"] = np.ones(shape, np.float32)
    message = (
        rf"transformer\.{name} of .* has shape {found}, .*vocab_size=96.*n_embd=64.* asks for {expected}$"
    )
    refused(tmp_path, ConversionError, message, tensors=tensors)


def test_weights_that_are_integers(tmp_path: Path) -> None:
    tensors = gpt2_tensors(GPT2_CONFIG)
    tensors["transformer.h.0.mlp.c_fc.weight"] = np.ones((64, 160), np.int8)
    refused(tmp_path, ConversionError, r"mlp\.c_fc\.weight of .* holds I8", tensors=tensors)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["h.1.mlp.c_fc.weight", "wte.weight", "wpe.weight", "h.0.ln_1.bias"])
def test_a_weight_that_is_no_number_is_found_in_the_checkpoint(
    tmp_path: Path, name: str, value: float, kind: str
) -> None:
    tensors = gpt2_tensors(GPT2_CONFIG)
    x = tensors[f"transformer.{name}"]
    index = tuple(size - 2 for size in x.shape)
    x[index] = value
    x[tuple(size - 1 for size in x.shape)] = value  # the first one is to be named
    where = ", ".join(map(str, index))
    message = rf"transformer\.{name} of .*model\.safetensors holds {value} at index \[{where}\]"
    error = refused(tmp_path, NonFiniteError, message, tensors=tensors, kind=kind)
    assert isinstance(error, NonFiniteError)
    assert error.tensor == f"transformer.{name}"
    assert error.index == np.ravel_multi_index(index, x.shape)


def test_the_bad_weight_is_found_in_any_band(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from azquant.conversion import write

    monkeypatch.setattr(write, "BAND_ELEMENTS", 7 * 64)
    tensors = gpt2_tensors(GPT2_CONFIG)
    tensors["transformer.wte.weight"][93, 5] = np.nan
    refused(tmp_path, NonFiniteError, r"nan at index \[93, 5\]", tensors=tensors)


@pytest.mark.parametrize(
    ("kind", "value"), [("f16", 65520.0), ("q4_0", 65520.0 * 8), ("q8_0", 65520.0 * 127)]
)
def test_a_weight_too_large_for_float16_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, value: float
) -> None:
    from azquant.conversion import write

    monkeypatch.setattr(write, "BAND_ELEMENTS", 3 * 64)  # its row is in the second band
    tensors = gpt2_tensors(GPT2_CONFIG)
    tensors["transformer.h.0.mlp.c_fc.weight"][3, 4] = value
    message = r"blk\.0\.ffn_up\.weight.*row 4, column 3.*transformer\.h\.0\.mlp\.c_fc\.weight.*convert to f32"
    refused(tmp_path, NonFiniteError, message, tensors=tensors, kind=kind)


def test_the_largest_weight_float16_holds_is_fine(tmp_path: Path) -> None:
    tensors = gpt2_tensors(GPT2_CONFIG)
    tensors["transformer.h.0.mlp.c_fc.weight"][3, 4] = 65519.0
    convert(write_checkpoint(tmp_path / "hf", GPT2_CONFIG, tensors), tmp_path / "out.gguf", "f16")


def test_a_checkpoint_without_tensors(tmp_path: Path) -> None:
    refused(tmp_path, ConversionError, r"wte\.weight is missing", tensors={})


# ---- files


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="nowhere"):
        convert(tmp_path / "nowhere", tmp_path / "out.gguf")


def test_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT2_CONFIG), encoding="utf-8")
    with pytest.raises(InputFileError, match=r"model\.safetensors"):
        convert(tmp_path, tmp_path / "out.gguf")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "hf", GPT2_CONFIG, gpt2_tensors(GPT2_CONFIG))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputFileError, match=r"model-00002-of-00002\.safetensors"):
        convert(folder, tmp_path / "out.gguf")


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "hf", GPT2_CONFIG, gpt2_tensors(GPT2_CONFIG))
    shard = folder / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors.*truncated"):
        convert(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_config_that_is_no_json(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", None, gpt2_tensors(GPT2_CONFIG))
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        convert(folder, tmp_path / "out.gguf")


def test_truncated_weights(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", GPT2_CONFIG, gpt2_tensors(GPT2_CONFIG))
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="truncated"):
        convert(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_weights_that_shrink_while_being_read(tmp_path: Path) -> None:
    """A download that is still being replaced: nothing half-written may remain."""
    folder = write_checkpoint(tmp_path / "hf", GPT2_CONFIG, gpt2_tensors(GPT2_CONFIG))
    weights = folder / "model.safetensors"
    (header,) = struct.unpack("<Q", weights.read_bytes()[:8])

    def cut(done: int, total: int) -> None:
        os.truncate(weights, 8 + header)

    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="cut short"):
        convert(folder, tmp_path / "out.gguf", progress=cut)
    assert sorted(tmp_path.rglob("*")) == before


def test_output_in_a_missing_folder(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", GPT2_CONFIG, gpt2_tensors(GPT2_CONFIG))
    with pytest.raises(OutputError, match="no folder"):
        convert(folder, tmp_path / "none" / "out.gguf")


def test_the_output_is_judged_before_the_input_is_opened(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no folder"):
        convert(tmp_path / "nowhere", tmp_path / "none" / "out.gguf")


def test_output_that_exists(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", GPT2_CONFIG, gpt2_tensors(GPT2_CONFIG))
    out = tmp_path / "out.gguf"
    out.write_bytes(b"mine")
    with pytest.raises(OutputError, match="already exists"):
        convert(folder, out)
    assert out.read_bytes() == b"mine"
    convert(folder, out, overwrite=True)
    assert out.read_bytes()[:4] == b"GGUF"


def test_a_failed_conversion_keeps_the_old_file(tmp_path: Path) -> None:
    tensors = gpt2_tensors(GPT2_CONFIG)
    tensors["transformer.ln_f.bias"][0] = np.nan  # the last tensor written
    folder = write_checkpoint(tmp_path / "hf", GPT2_CONFIG, tensors)
    out = tmp_path / "out.gguf"
    out.write_bytes(b"mine")
    with pytest.raises(NonFiniteError):
        convert(folder, out, overwrite=True)
    assert out.read_bytes() == b"mine"


def test_output_that_is_the_input(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", GPT2_CONFIG, gpt2_tensors(GPT2_CONFIG))
    weights = folder / "model.safetensors"
    (tmp_path / "link.gguf").hardlink_to(weights)
    before = weights.read_bytes()
    for out in (weights, tmp_path / "link.gguf"):
        with pytest.raises(OutputError, match="same file as the input"):
            convert(folder, out, overwrite=True)
    assert weights.read_bytes() == before


@pytest.mark.parametrize("kind", ["iq2_xs", "i8", "nvfp4", "q4"])
def test_a_type_that_cannot_be_made(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UnsupportedTypeError, match=f"cannot make {kind} files; known are f32, f16, q4_0,"):
        convert(tmp_path, tmp_path / "out.gguf", kind)


def test_types_are_known_in_any_case(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", LLAMA_CONFIG, llama_tensors(LLAMA_CONFIG))
    assert convert(folder, tmp_path / "out.gguf", "Q8_0").type == "q8_0"
