"""Checkpoints without a config: nanoGPT's and the course's, judged by torch running the same modules."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_support import as_f32, llama_cpp, read_metadata, read_tensors
from tokenizer_support import PROSE, train

import azquant
from azquant.conversion import ConversionReport, convert
from azquant.errors import ArgumentError, ConversionError, ConversionWarning, ModelError

torch = pytest.importorskip("torch")
from scratch_models import (  # noqa: E402
    HEADS,
    LAYERS,
    POSITIONS,
    VOCAB,
    WIDTH,
    CourseGPT,
    NanoGPT,
    logits,
    randomized,
    save_nanogpt,
)

TOKENS = np.random.default_rng(5).integers(0, VOCAB, 60).tolist()
ACTIVATIONS = {"gelu": torch.nn.GELU, "gelu_tanh": lambda: torch.nn.GELU("tanh"), "relu": torch.nn.ReLU}


def converted(source: Path, kind: str = "f32", **options: Any) -> tuple[Path, ConversionReport, str]:
    """The file, the report, and the warnings that were given."""
    out = source.with_suffix(".gguf")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = convert(source, out, kind, overwrite=True, **options)
    assert all(issubclass(item.category, ConversionWarning) for item in caught)
    return out, report, "\n".join(str(item.message) for item in caught)


def our_logits(path: Path) -> Any:
    return azquant.load(path, compute="fp32", kv_type="f32").logits(TOKENS)


def save(path: Path, model: Any) -> Path:
    torch.save(model.state_dict(), path)
    return path


# nanoGPT


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_nanogpt(tmp_path: Path, bias: bool, compiled: bool) -> None:
    model = randomized(NanoGPT(bias))
    source = save_nanogpt(tmp_path / "ckpt.pt", model, compiled)
    out, report, _ = converted(source)
    assert np.abs(our_logits(out) - logits(model, TOKENS)).max() < 1e-4
    found = read_metadata(out)
    assert found["gpt2.attention.head_count"][1] == HEADS
    assert found["gpt2.hidden_activation"] == ("STRING", "gelu")
    tensors = read_tensors(out)
    assert len(tensors) == 4 + 12 * LAYERS
    assert "output.weight" not in tensors  # tied
    assert report.architecture == "gpt2"
    state = model.state_dict()
    assert np.array_equal(
        as_f32(out, "blk.1.ffn_up.weight"), state["transformer.h.1.mlp.c_fc.weight"].numpy()
    )
    if not bias:
        assert not as_f32(out, "blk.0.attn_qkv.bias").any()
        assert not as_f32(out, "output_norm.bias").any()


def test_nanogpt_with_a_head_of_its_own(tmp_path: Path) -> None:
    model = NanoGPT()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCAB, WIDTH))
    out, _, _ = converted(save(tmp_path / "m.pt", randomized(model)), heads=HEADS)
    assert "output.weight" in read_tensors(out)
    assert np.abs(our_logits(out) - logits(model, TOKENS)).max() < 1e-4


def test_padded_vocabulary(tmp_path: Path) -> None:
    """nanoGPT rounds 50257 up to 50304; the rows that no token has are written as unused tokens."""
    model = randomized(NanoGPT(vocab=128))
    tokenizer = train(vocab_size=300)
    content = json.loads(tokenizer.to_str())
    kept = dict(sorted(content["model"]["vocab"].items(), key=lambda item: item[1])[:100])
    content["model"] |= {"vocab": kept, "merges": []}
    (tmp_path / "tok.json").write_text(json.dumps(content))
    source = save_nanogpt(tmp_path / "ckpt.pt", model)
    out, _, _ = converted(source, tokenizer=tmp_path / "tok.json")
    found = read_metadata(out)
    assert len(found["tokenizer.ggml.tokens"][1]) == 128
    assert list(found["tokenizer.ggml.token_type"][1][99:102]) == [1, 5, 5]
    assert np.abs(our_logits(out) - logits(model, TOKENS)).max() < 1e-4


def test_a_safetensors_file_of_a_state_dict(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = randomized(CourseGPT())
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, tmp_path / "m.safetensors")
    out, _, _ = converted(tmp_path / "m.safetensors")
    assert np.abs(our_logits(out) - logits(model, TOKENS)).max() < 1e-4


# The course's layout


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scale_by", ["head", "embedding"])
def test_the_courses_layout(tmp_path: Path, activation: str, scale_by: str) -> None:
    model = randomized(CourseGPT(ACTIVATIONS[activation](), scale_by))
    source = save(tmp_path / "az_llm_100m_final.pt", model)
    out, report, said = converted(source, activation=activation, attention_scale=scale_by)
    assert np.abs(our_logits(out) - logits(model, TOKENS)).max() < 1e-4
    found = read_metadata(out)
    sizes = {
        "context_length": POSITIONS,
        "embedding_length": WIDTH,
        "feed_forward_length": 4 * WIDTH,
        "block_count": LAYERS,
        "attention.head_count": HEADS,
        "vocab_size": VOCAB,
    }
    assert {key: found[f"gpt2.{key}"][1] for key in sizes} == sizes
    assert found["general.name"][1] == "Az Llm 100m Final"
    names = {"gelu": "gelu", "gelu_tanh": None, "relu": "relu"}
    assert found.get("gpt2.hidden_activation", (None, None))[1] == names[activation]
    assert np.array_equal(np.float32(found["azquant.output.bias"][1]), model.lm_head.bias.detach().numpy())
    assert "the output head has a bias" in said
    assert ("computes GELU exactly" in said) == (activation == "gelu")
    assert f"{HEADS} heads of each block fused into one attn_qkv" in report.notes
    q4, _, _ = converted(source, "q4_0", activation=activation, attention_scale=scale_by)
    assert np.corrcoef(our_logits(q4).ravel(), logits(model, TOKENS).ravel())[0, 1] > 0.95


def test_heads_are_fused_in_order(tmp_path: Path) -> None:
    model = randomized(CourseGPT())
    out, report, _ = converted(save(tmp_path / "m.pt", model))
    state = model.state_dict()
    rows = [
        state[f"blocks.1.sa.heads.{head}.{part}.weight"].numpy()
        for part in ("query", "key", "value")
        for head in range(HEADS)
    ]
    assert np.array_equal(as_f32(out, "blk.1.attn_qkv.weight"), np.concatenate(rows))
    row = next(row for row in report.tensors if row.name == "blk.1.attn_qkv.weight")
    assert row.source == "blocks.1.sa.heads.*.{query,key,value}.weight"


def test_bands_may_cut_through_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from azquant.conversion import write

    source = save(tmp_path / "m.pt", randomized(CourseGPT()))
    whole = read_tensors(converted(source, attention_scale="embedding")[0])
    for rows in (1, 7, 16, 65):
        monkeypatch.setattr(write, "BAND_ELEMENTS", rows * WIDTH)
        assert read_tensors(converted(source, attention_scale="embedding")[0]) == whole


def test_data_parallel_and_compiled_names(tmp_path: Path) -> None:
    model = randomized(CourseGPT())
    state = {f"module._orig_mod.{name}": x for name, x in model.state_dict().items()}
    torch.save({"model_state_dict": state, "epoch": 3}, tmp_path / "m.pt")
    out, _, _ = converted(tmp_path / "m.pt")
    assert np.abs(our_logits(out) - logits(model, TOKENS)).max() < 1e-4


def test_conversion_without_torch(tmp_path: Path) -> None:
    course, nano = randomized(CourseGPT()), randomized(NanoGPT(bias=False))
    sources = [save(tmp_path / "course.pt", course), save_nanogpt(tmp_path / "nano.pt", nano)]
    program = (
        "import sys, warnings\n"
        "for name in ('torch', 'transformers', 'tokenizers'): sys.modules[name] = None\n"
        "warnings.simplefilter('ignore')\n"
        "import azquant\n"
        "for path in sys.argv[1:]: azquant.convert(path, path + '.gguf', 'f32')\n"
    )
    subprocess.run([sys.executable, "-c", program, *map(str, sources)], check=True, timeout=60)
    for model, source in zip((course, nano), sources, strict=True):
        assert np.abs(our_logits(Path(f"{source}.gguf")) - logits(model, TOKENS)).max() < 1e-4


# llama.cpp


def _with_tokenizer(tmp_path: Path, activation: str) -> tuple[Any, Path]:
    tokenizer = train(vocab_size=420)
    tokenizer.save(str(tmp_path / "az_llm-tokenizer.json"))
    model = randomized(CourseGPT(ACTIVATIONS[activation](), vocab=420))
    with torch.no_grad():
        model.lm_head.bias.zero_()
    source = save(tmp_path / "m.pt", model)
    out, _, said = converted(source, tokenizer=tmp_path / "az_llm-tokenizer.json", activation=activation)
    assert "azquant.output.bias" not in read_metadata(out)
    assert "head has a bias" not in said
    return model, out


@pytest.mark.parametrize(("activation", "bound"), [("gelu", 0.01), ("gelu_tanh", 0.01), ("relu", 0.05)])
def test_llama_cpp_tokenizes_and_continues(tmp_path: Path, activation: str, bound: float) -> None:
    """The bound is on log-probabilities; llama.cpp looks GELU up in a table of half floats."""
    model, out = _with_tokenizer(tmp_path, activation)
    ours = azquant.load(out, compute="fp32", kv_type="f32")
    prompt = PROSE[:40]
    answer = llama_cpp(out, {"prompt": prompt, "n_predict": 8, "n_probs": 20, "return_tokens": True})[0]
    ids = ours.tokenizer.encode(prompt)
    assert answer["tokens_evaluated"] == len(ids)
    expected = torch.log_softmax(torch.tensor(logits(model, ids)[-1]), -1)
    first = answer["completion_probabilities"][0]["top_logprobs"]
    assert len(first) == 20
    assert max(abs(expected[row["id"]].item() - row["logprob"]) for row in first) < bound
    assert ours.generate(ids, max_tokens=8) == answer["tokens"]


def test_llama_cpp_loads_a_file_with_a_head_bias(tmp_path: Path) -> None:
    """It leaves the bias out: what it answers is the model without one."""
    tokenizer = train(vocab_size=420)
    tokenizer.save(str(tmp_path / "tok.json"))
    model = randomized(CourseGPT(torch.nn.GELU("tanh"), vocab=420))
    out, _, _ = converted(
        save(tmp_path / "m.pt", model), tokenizer=tmp_path / "tok.json", activation="gelu_tanh"
    )
    answer = llama_cpp(out, {"prompt": [5, 6, 7], "n_predict": 1, "n_probs": 20})[0]
    with torch.no_grad():
        model.lm_head.bias.zero_()
    expected = torch.log_softmax(torch.tensor(logits(model, [5, 6, 7])[-1]), -1)
    first = answer["completion_probabilities"][0]["top_logprobs"]
    assert max(abs(expected[row["id"]].item() - row["logprob"]) for row in first) < 0.01


# Refusals


def _course_state() -> dict[str, Any]:
    return dict(randomized(CourseGPT()).state_dict())


def _refused(tmp_path: Path, state: Any, match: str, **options: Any) -> None:
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(ConversionError, match=match):
        convert(tmp_path / "m.pt", tmp_path / "out.gguf", "f32", **options)
    assert not (tmp_path / "out.gguf").exists()


def test_an_unknown_layout(tmp_path: Path) -> None:
    _refused(tmp_path, {"encoder.weight": torch.zeros(4, 4)}, r"there is no config\.json .*encoder\.weight")


def test_transformers_weights_alone(tmp_path: Path) -> None:
    state = {
        "transformer.wte.weight": torch.zeros(8, 4),
        "transformer.h.0.attn.c_attn.weight": torch.zeros(4, 12),
    }
    _refused(tmp_path, state, "transformers' GPT-2")


def test_heads_that_nothing_tells(tmp_path: Path) -> None:
    _refused(tmp_path, randomized(NanoGPT()).state_dict(), "give heads=")


def test_heads_against_what_is_counted(tmp_path: Path) -> None:
    _refused(tmp_path, _course_state(), "heads=2 is given, but .* says 4", heads=2)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("blocks.1.sa.heads.2.key.weight", r"blocks\.1\.sa\.heads\.2\.key\.weight is missing"),
        ("blocks.1.sa.proj.bias", r"blocks\.1\.sa\.proj\.bias is missing"),
        ("blocks.0.sa.proj.bias", r"blocks\.1\.sa\.proj\.bias is there"),
        ("blocks.1.ln2.weight", r"blocks\.1\.ln2\.weight is missing"),
        ("position_embedding_table.weight", r"position_embedding_table\.weight is missing"),
        ("ln_f.weight", r"ln_f\.weight is missing"),
        ("lm_head.weight", None),
    ],
)
def test_a_missing_tensor(tmp_path: Path, name: str, match: str | None) -> None:
    state = _course_state()
    del state[name]
    if match is None:  # then the embedding is the head
        torch.save(state, tmp_path / "m.pt")
        assert "output.weight" not in read_tensors(converted(tmp_path / "m.pt")[0])
    else:
        _refused(tmp_path, state, match)


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("blocks.1.sa.heads.2.key.weight", (8, WIDTH), "heads must be alike"),
        ("blocks.1.ffwd.net.0.weight", (100, WIDTH), "the sizes of the other tensors ask for 256 x 64"),
        (
            "lm_head.bias",
            (VOCAB + 1,),
            r"lm_head\.bias has 97 entries, but the embedding has the shape 96 x 64",
        ),
        ("lm_head.bias", (1, VOCAB), "not that of a bias"),
        ("token_embedding_table.weight", (VOCAB,), "not a matrix's"),
        ("token_embedding_table.weight", (VOCAB, 66), "not a multiple of 4 heads"),
    ],
)
def test_a_shape_that_does_not_fit(tmp_path: Path, name: str, shape: Any, match: str) -> None:
    _refused(tmp_path, {**_course_state(), name: torch.zeros(shape)}, match)


def test_heads_smaller_than_the_width(tmp_path: Path) -> None:
    state = _course_state()
    for name in [name for name in state if ".sa.heads." in name and name.endswith("weight")]:
        state[name] = state[name][:12].clone()
    _refused(tmp_path, state, r"48 elements together \(4 heads of 12\), but n_embd is 64")


def test_a_tensor_that_would_be_dropped(tmp_path: Path) -> None:
    _refused(tmp_path, {**_course_state(), "blocks.0.gate.weight": torch.zeros(2)}, "would be dropped")


def test_a_head_bias_that_is_no_number(tmp_path: Path) -> None:
    state = _course_state()
    state["lm_head.bias"][3] = math.nan
    _refused(tmp_path, state, r"lm_head\.bias of .*m\.pt holds nan at index \[3\]")


def test_model_args_that_contradict_the_tensors(tmp_path: Path) -> None:
    model = randomized(NanoGPT())
    model.model_args["block_size"] = 64
    source = save_nanogpt(tmp_path / "ckpt.pt", model)
    with pytest.raises(ConversionError, match="block_size is 64, but the tensors say 128"):
        convert(source, tmp_path / "out.gguf", "f32")


@pytest.mark.parametrize(
    "options", [{"activation": "swish"}, {"attention_scale": "width"}, {"heads": 0}, {"heads": True}]
)
def test_options_out_of_range(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        convert(tmp_path / "m.pt", tmp_path / "out.gguf", "f32", **options)


def test_options_beside_a_config(tmp_path: Path) -> None:
    from convert_support import GPT2_CONFIG, gpt2_tensors, write_checkpoint

    folder = write_checkpoint(tmp_path / "hf", GPT2_CONFIG, gpt2_tensors(GPT2_CONFIG))
    with pytest.raises(ArgumentError, match=r"only for checkpoints without a config\.json"):
        convert(folder, tmp_path / "out.gguf", "f32", activation="relu")


# Reading the keys back


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"gpt2.hidden_activation": "swish"}, "hidden_activation is 'swish'"),
        ({"azquant.output.bias": [1.0, 2.0]}, "has shape"),
        ({"azquant.output.bias": "x"}, "no array of numbers"),
        ({"azquant.output.bias": [math.inf] * 4}, "NaN or infinity"),
    ],
)
def test_bad_keys_are_refused(change: dict[str, Any], match: str) -> None:
    from azquant.architectures import GPT2Config

    good: dict[str, Any] = {
        "gpt2.vocab_size": 4,
        "gpt2.embedding_length": 8,
        "gpt2.context_length": 8,
        "gpt2.feed_forward_length": 8,
        "gpt2.block_count": 1,
        "gpt2.attention.head_count": 1,
        "gpt2.attention.layer_norm_epsilon": 1e-5,
    }
    assert GPT2Config.from_gguf(good).activation == "gelu_tanh"
    with pytest.raises(ModelError, match=match):
        GPT2Config.from_gguf(good | change)


# transformers' GPT-2 with the same activations


@pytest.mark.parametrize("name", ["gelu", "relu", "gelu_new"])
def test_transformers_gpt2_with_another_activation(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=POSITIONS, n_embd=WIDTH, n_head=HEADS, n_layer=LAYERS,
        activation_function=name,
    )  # fmt: skip
    model = randomized(transformers.GPT2LMHeadModel(config))
    model.save_pretrained(tmp_path / "hf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConversionWarning)
        convert(tmp_path / "hf", tmp_path / "hf.gguf", "f32")
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    assert np.abs(our_logits(tmp_path / "hf.gguf") - expected).max() < 1e-4
