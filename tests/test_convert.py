"""Conversion as a whole: report, metadata, memory, real checkpoints, and llama.cpp as the judge."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_support import (
    GPT2_CONFIG,
    LLAMA_CONFIG,
    as_f32,
    gpt2_tensors,
    llama_cpp,
    llama_tensors,
    quantized,
    read_metadata,
    read_tensors,
    write_checkpoint,
    write_sharded,
)

from azquant.conversion import ConversionReport, convert
from azquant.conversion.metadata import model_card, size_label
from azquant.errors import ConversionWarning

NO_TOKENIZER = "ignore:.*no tokenizer:azquant.errors.ConversionWarning"


# ---- report


@pytest.mark.filterwarnings(NO_TOKENIZER)
def test_report_adds_up(tmp_path: Path) -> None:
    config = {**GPT2_CONFIG, "tie_word_embeddings": False}
    tensors = gpt2_tensors(config)
    out = tmp_path / "out.gguf"
    report = convert(write_checkpoint(tmp_path / "hf", config, tensors), out, "q4_0")
    assert isinstance(report, ConversionReport)
    assert (report.architecture, report.type, report.destination) == ("gpt2", "q4_0", out)
    assert report.parameters == sum(x.size for x in tensors.values())
    assert report.source_bytes == sum(x.nbytes for x in tensors.values())
    assert report.file_bytes == out.stat().st_size > report.tensor_bytes
    found = read_tensors(out)
    assert [row.name for row in report.tensors] == list(found)
    assert [row.nbytes for row in report.tensors] == [len(data) for _, _, data in found.values()]
    assert report.bits_per_weight == pytest.approx(8 * report.tensor_bytes / report.parameters)
    assert {row.source for row in report.tensors} == set(tensors)
    assert {row.source_type for row in report.tensors} == {"F32"}
    by_type = report.by_type()
    assert by_type.keys() == {"f32", "q8_0", "q4_0"}
    assert sum(elements for _, elements, _ in by_type.values()) == report.parameters
    row = next(row for row in report.rows() if row[0] == "output.weight")
    assert row == (
        "output.weight",
        "96 x 64",
        "F32",
        "q8_0",
        str(96 * 64 // 32 * 34),
        "the output head: rows of 64 are no whole number of q6_k blocks (256)",
    )


@pytest.mark.filterwarnings(NO_TOKENIZER)
def test_dry_run_writes_nothing_and_says_the_same(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", LLAMA_CONFIG, llama_tensors(LLAMA_CONFIG))
    out = tmp_path / "out.gguf"
    dry = convert(folder, out, "q4_0", dry_run=True)
    assert not out.exists()
    assert dry.file_bytes is None
    assert convert(folder, out, "q4_0").tensors == dry.tensors


def test_warnings_point_at_the_caller_and_are_in_the_report(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", GPT2_CONFIG, gpt2_tensors(GPT2_CONFIG))
    with pytest.warns(ConversionWarning) as caught:
        report = convert(folder, tmp_path / "out.gguf", "q4_0")
    assert {item.filename for item in caught} == {__file__}
    assert [str(item.message) for item in caught] == list(report.warnings)
    assert len(report.warnings) == 1 and "no tokenizer" in report.warnings[0]


@pytest.mark.filterwarnings(NO_TOKENIZER)
def test_progress_ends_at_the_file_size(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", GPT2_CONFIG, gpt2_tensors(GPT2_CONFIG))
    calls: list[tuple[int, int]] = []
    report = convert(folder, tmp_path / "out.gguf", progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1] == (report.file_bytes, report.file_bytes)


@pytest.mark.filterwarnings(NO_TOKENIZER)
def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", GPT2_CONFIG, gpt2_tensors(GPT2_CONFIG))
    for name in ("a.gguf", "b.gguf"):
        convert(folder, tmp_path / name)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.filterwarnings(NO_TOKENIZER)
def test_shards_make_the_same_file_as_one(tmp_path: Path) -> None:
    tensors = gpt2_tensors(GPT2_CONFIG)
    convert(write_checkpoint(tmp_path / "one" / "hf", GPT2_CONFIG, tensors), tmp_path / "one.gguf")
    convert(write_sharded(tmp_path / "two" / "hf", GPT2_CONFIG, tensors), tmp_path / "two.gguf")
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    assert read_tensors(one) == read_tensors(two)
    different = {key for key, value in read_metadata(one).items() if read_metadata(two)[key] != value}
    assert different == {"azquant.source.files", "azquant.source.sha256"}


# ---- awkward shapes


@pytest.mark.filterwarnings(NO_TOKENIZER)
def test_rows_that_are_no_whole_blocks_become_f16_and_it_is_said(tmp_path: Path) -> None:
    config = {**GPT2_CONFIG, "n_inner": 100}
    tensors = gpt2_tensors(config)
    out = tmp_path / "out.gguf"
    with pytest.warns(ConversionWarning, match="rows of 100 .* 2 tensors written as f16"):
        report = convert(write_checkpoint(tmp_path / "hf", config, tensors), out, "q4_0")
    shape, kind, data = read_tensors(out)["blk.1.ffn_down.weight"]
    x = tensors["transformer.h.1.mlp.c_proj.weight"].T
    assert (shape, kind, data) == ((64, 100), "F16", x.astype(np.float16).tobytes())
    assert read_tensors(out)["blk.1.ffn_up.weight"][1] == "Q4_0"  # its rows are 64 long
    assert "rows of 100" in next(row.reason for row in report.tensors if row.name == "blk.1.ffn_down.weight")


@pytest.mark.filterwarnings(NO_TOKENIZER)
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_plain_types_take_any_row_length_without_a_word(tmp_path: Path, kind: str) -> None:
    config = {**GPT2_CONFIG, "n_inner": 100}
    folder = write_checkpoint(tmp_path / "hf", config, gpt2_tensors(config))
    report = convert(folder, tmp_path / "out.gguf", kind)
    assert not [text for text in report.warnings if "rows" in text]


@pytest.mark.filterwarnings(NO_TOKENIZER)
@pytest.mark.parametrize(("stored", "name"), [(np.float16, "F16"), (np.float64, "F64")])
def test_half_and_double_checkpoints(tmp_path: Path, stored: Any, name: str) -> None:
    tensors = {key: x.astype(stored) for key, x in gpt2_tensors(GPT2_CONFIG).items()}
    out = tmp_path / "out.gguf"
    report = convert(write_checkpoint(tmp_path / "hf", GPT2_CONFIG, tensors), out, "f32")
    assert {row.source_type for row in report.tensors} == {name}
    expected = tensors["transformer.h.0.mlp.c_fc.weight"].T.astype(np.float32)
    assert np.array_equal(as_f32(out, "blk.0.ffn_up.weight"), expected)


# ---- metadata


@pytest.mark.filterwarnings(NO_TOKENIZER)
def test_names_and_model_card(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "az-llm-134m-chat-v1.0", GPT2_CONFIG, gpt2_tensors(GPT2_CONFIG))
    card = """\
    ---
    language:
    - az
    - "en"
    license: apache-2.0 # as the data
    tags: [text-generation, 'azerbaijani']
    model-index:
      - name: nested
        results: []
    ---
    # Title
    license: not this one
    """
    (folder / "README.md").write_text(textwrap.dedent(card), encoding="utf-8")
    out = tmp_path / "out.gguf"
    convert(folder, out, "f16")
    found = read_metadata(out)
    assert found["general.name"] == ("STRING", "Az Llm 134m Chat v1.0")
    assert found["general.basename"] == ("STRING", "az-llm")
    assert found["general.finetune"] == ("STRING", "chat")
    assert found["general.version"] == ("STRING", "v1.0")
    assert found["general.license"] == ("STRING", "apache-2.0")
    assert found["general.languages"] == ("ARRAY", ["az", "en"])
    assert found["general.size_label"] == ("STRING", size_label(gpt2_parameters()))
    assert found["general.file_type"] == ("UINT32", 1)
    assert found["azquant.source.name"] == ("STRING", "az-llm-134m-chat-v1.0")
    assert found["azquant.source.format"] == ("STRING", "safetensors")


def gpt2_parameters() -> int:
    return sum(x.size for x in gpt2_tensors(GPT2_CONFIG).values())


@pytest.mark.filterwarnings(NO_TOKENIZER)
@pytest.mark.parametrize(
    ("name_or_path", "expected"),
    [
        ("somebody/tiny-az", "Tiny Az"),
        ("tiny-az", "Tiny Az"),
        ("/home/me/models/tiny-az", "Hf"),
        ("C:\\models\\tiny", "Hf"),
        ("./out", "Hf"),
        ("", "Hf"),
        (3, "Hf"),
    ],
)
def test_only_a_model_id_is_taken_from_name_or_path(tmp_path: Path, name_or_path: Any, expected: str) -> None:
    config = {**GPT2_CONFIG, "_name_or_path": name_or_path}
    convert(write_checkpoint(tmp_path / "hf", config, gpt2_tensors(config)), tmp_path / "out.gguf", "f32")
    assert read_metadata(tmp_path / "out.gguf")["general.name"] == ("STRING", expected)


@pytest.mark.parametrize(
    "text",
    ["", "no front matter", "---\nlicense: mit\n", "---\n- a\n---\n", "---\nlicense: |\n  text\n---\n"],
    ids=["empty", "none", "never closed", "list", "block text"],
)
def test_a_card_without_usable_front_matter_is_an_empty_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert model_card(tmp_path / "README.md") == {}


def test_a_card_that_is_not_utf8_or_missing_is_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert model_card(tmp_path / "README.md") == {}
    assert model_card(tmp_path / "none.md") == {}


@pytest.mark.parametrize(
    "count", [1, 42, 999, 260_032, 999_999, 1_000_001, 5_854_208, 9_960_000, 134_105_856, 7e9]
)
def test_size_label_is_the_gguf_packages(count: float) -> None:
    import gguf

    assert size_label(int(count)) == gguf.size_label(int(count), int(count), 0, 0)


# ---- memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see the peak memory")
def test_converting_the_real_shape_takes_little_memory(tmp_path: Path) -> None:
    """134M parameters, untied: 536 MB of float32. The peak is that of the process, NumPy included."""
    config = {
        **GPT2_CONFIG,
        "vocab_size": 32000,
        "n_positions": 256,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_inner": None,
        "tie_word_embeddings": False,
    }
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    _sparse_safetensors(folder / "model.safetensors", _gpt2_shapes(config))
    # Not ru_maxrss: on Linux it survives fork and exec, and would tell this test process's peak.
    program = """
        import pathlib, sys, warnings
        warnings.simplefilter("ignore")
        from azquant.conversion import convert
        report = convert(sys.argv[1], sys.argv[2], "q4_0")
        status = pathlib.Path("/proc/self/status").read_text()
        print(report.parameters, status.split("VmHWM:")[1].split()[0])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(folder), str(tmp_path / "out.gguf")],
        capture_output=True,
        text=True,
        check=True,
    )
    parameters, peak_kb = map(int, done.stdout.split())
    assert parameters == 134_404_608
    limit_mb = 150
    assert peak_kb / 1024 < limit_mb, f"peak RSS {peak_kb / 1024:.0f} MB"


def _gpt2_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width = config["n_embd"]
    small = {**config, "vocab_size": 1, "n_positions": 1, "n_embd": 4, "n_inner": None, "n_layer": 1}
    scale = {4: width, 12: 3 * width, 16: 4 * width}
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (config["vocab_size"], width),
        "transformer.wte.weight": (config["vocab_size"], width),
        "transformer.wpe.weight": (config["n_positions"], width),
    }
    for name, x in gpt2_tensors(small).items():
        for i in range(config["n_layer"] if ".h.0." in name else 1):
            shapes.setdefault(name.replace(".h.0.", f".h.{i}."), tuple(scale.get(n, n) for n in x.shape))
    return shapes


def _sparse_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A file of zeros that takes no disk space, with one nonzero weight so that head and embedding differ."""
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        first = file.tell()
        file.write(np.float32(1).tobytes())
        file.truncate(first + offset)


# ---- real checkpoints


def test_az_llm_small(shared_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConversionWarning)
        report = convert(shared_data / "az_llm_small", out, "q4_0")
    assert report.parameters == 5_853_184
    assert report.file_bytes is not None and report.file_bytes < 4_300_000
    import safetensors.numpy

    tensors = safetensors.numpy.load_file(shared_data / "az_llm_small" / "model.safetensors")
    found = read_tensors(out)
    assert found["token_embd.weight"][:2] == ((4096, 256), "Q6_K")  # its bytes: test_quantize_file.py
    up = np.ascontiguousarray(tensors["transformer.h.3.mlp.c_fc.weight"].T)
    assert found["blk.3.ffn_up.weight"] == ((1024, 256), "Q4_0", quantized(up, "Q4_0"))
    metadata = read_metadata(out)
    assert metadata["tokenizer.ggml.model"] == ("STRING", "gpt2")
    assert len(metadata["tokenizer.ggml.tokens"][1]) == 4096


# ---- llama.cpp as the judge


@pytest.mark.parametrize("kind", ["f32", "q4_0"])
def test_llama_cpp_continues_az_llm_small(shared_data: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("xllamacpp")
    out = tmp_path / "out.gguf"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConversionWarning)
        convert(shared_data / "az_llm_small", out, kind)
    (answer,) = llama_cpp(out, {"prompt": "Azərbaycan Respublikası", "n_predict": 16})
    assert answer["tokens_predicted"] >= 8
    assert len(answer["content"].split()) >= 4
    assert "\ufffd" not in answer["content"]


VOCAB_SIZE = 257


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


def _model(kind: str, **options: Any) -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    base: dict[str, Any]
    if kind == "gpt2":
        base = {
            "n_positions": 64, "n_embd": 64, "n_head": 4, "n_layer": 3, "n_inner": 100, "bos_token_id": 256,
            "eos_token_id": 256,
        }  # fmt: skip
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=VOCAB_SIZE, **(base | options))
        )
    else:
        base = {
            "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "bos_token_id": 256,
            "eos_token_id": 256,
        }  # fmt: skip
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=VOCAB_SIZE, **(base | options))
        )
    for name, parameter in model.named_parameters():  # strong weights, and no bias left at zero
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            torch.nn.init.normal_(parameter, mean=float("norm" in name or "ln_" in name), std=0.3)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt2", {}),
        ("gpt2", {"tie_word_embeddings": False}),
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 16}),
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
                }
            },
        ),
    ],
    ids=[
        "gpt2", "gpt2 untied", "gpt2 no head scale", "gpt2 layer scale", "llama gqa", "llama tied mha",
        "llama attention bias", "llama mlp bias", "llama linear rope", "llama3 rope",
    ],
)  # fmt: skip
def test_llama_cpp_agrees_with_transformers(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    """What is folded, permuted or carried in a tensor of its own gives transformers' next token."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("xllamacpp")
    model = _model(kind, **options)
    model.save_pretrained(tmp_path / "hf")
    byte_tokenizer().save(str(tmp_path / "hf" / "tokenizer.json"))
    convert(tmp_path / "hf", tmp_path / "out.gguf", "f32")
    tokens = np.random.default_rng(2).integers(0, VOCAB_SIZE - 1, 40).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1).numpy()
    # The bias makes it choose "A", since half a character is not answered; probabilities come without it.
    bias = [[byte_tokenizer().token_to_id("A"), 1000.0]]
    request = {"prompt": tokens, "n_predict": 1, "n_probs": VOCAB_SIZE, "logit_bias": bias}
    (answer,) = llama_cpp(tmp_path / "out.gguf", request)
    top = answer["completion_probabilities"][0]["top_logprobs"]
    found = {entry["id"]: entry["logprob"] for entry in top}
    assert len(found) == VOCAB_SIZE
    assert expected.max() - expected.min() > 3  # else nothing is being told apart
    for token, logprob in found.items():
        assert logprob == pytest.approx(expected[token], abs=0.01)
