"""quantize_, load_gguf and save_gguf on transformers models; the oracles are azquant.convert, the gguf
package, transformers on dequantized weights, and llama.cpp for adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tiny_models  # noqa: E402
from convert_support import llama_cpp, read_tensors  # noqa: E402

import azquant as aq  # noqa: E402
from azquant.errors import (  # noqa: E402
    ArgumentError,
    ConversionError,
    ConversionWarning,
    ModelError,
    NonFiniteError,
    OutputError,
    ShapeError,
    UnsupportedTypeError,
)
from azquant.gguf import open_gguf, write_gguf  # noqa: E402
from azquant.torch import (  # noqa: E402
    QuantEmbedding,
    QuantLinear,
    load_gguf,
    quantize_,
    save_gguf,
    save_lora_gguf,
)

nn = torch.nn
GPT2 = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_inner": 160, "n_positions": 64}


def gpt2(**options: Any) -> Any:
    """A GPT-2 whose weights and biases are all random."""
    ids = {"bos_token_id": 256, "eos_token_id": 256}
    config = transformers.GPT2Config(
        vocab_size=257, attn_implementation="eager", **{**GPT2, **ids, **options}
    )
    torch.manual_seed(5)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
    return model


def build(name: str) -> Any:
    return gpt2() if name == "gpt2" else tiny_models.build(name)


NAMES = ["gpt2", "llama", "smollm", "mistral", "qwen2", "qwen3", "phi3", "starcoder2", "granite"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_models.save(build(name), root / name) for name in NAMES}


def logits(model: Any, count: int = 24) -> Any:
    with torch.no_grad():
        return model(torch.tensor([tiny_models.tokens(count)])).logits[0]


def dequantized(model: Any) -> Any:
    """The model with dense layers on the dequantized weights: what the quantized one should compute."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        dense: Any
        if isinstance(module, QuantLinear):
            dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            dense.bias = module.bias
        elif isinstance(module, QuantEmbedding):
            dense = nn.Embedding(module.num_embeddings, module.embedding_dim)
        else:
            continue
        dense.weight = nn.Parameter(module.dequantize())
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, dense)
    return model


def engine_logits(path: Path, compute: str) -> Any:
    return torch.from_numpy(np.array(aq.load(path, compute=compute).logits(tiny_models.tokens(24))))


def error(found: Any, expected: Any) -> float:
    return float((found - expected).norm() / expected.norm())


# ---- quantize_ and save_gguf -------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::azquant.errors.ConversionWarning")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("type", ["q4_0", "q8_0", "q4_k_m"])
def test_quantize_then_save_equals_converting_byte_for_byte(
    folders: dict[str, Path], tmp_path: Path, name: str, type: str
) -> None:
    aq.convert(folders[name], tmp_path / "converted.gguf", type)
    model = build(name)
    quantize_(model, type)
    save_gguf(model, tmp_path / "saved.gguf", folder=folders[name], type=type)
    assert (tmp_path / "saved.gguf").read_bytes() == (tmp_path / "converted.gguf").read_bytes()


@pytest.mark.filterwarnings("ignore::azquant.errors.ConversionWarning")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("type", ["q4_0", "f16", "f32"])
def test_a_gguf_file_goes_in_and_out_byte_for_byte(
    folders: dict[str, Path], tmp_path: Path, name: str, type: str
) -> None:
    aq.convert(folders[name], tmp_path / "a.gguf", type)
    model = build(name)
    for parameter in model.parameters():
        parameter.data.zero_()
    load_gguf(model, tmp_path / "a.gguf")
    save_gguf(model, tmp_path / "b.gguf", like=tmp_path / "a.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


@pytest.mark.parametrize("name", ["gpt2", "llama", "smollm"])
def test_logits_are_those_of_the_dequantized_weights(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """And of the file: transformers runs what the engine runs."""
    model = build(name)
    quantize_(model, compute="fp32")
    expected = logits(dequantized(model))
    assert error(logits(model), expected) <= 1e-5
    save_gguf(model, tmp_path / "a.gguf", folder=folders[name])
    loaded = build(name)
    load_gguf(loaded, tmp_path / "a.gguf", compute="fp32")
    assert torch.equal(logits(loaded), logits(model))
    assert error(engine_logits(tmp_path / "a.gguf", "fp32"), expected) <= 5e-3  # its KV cache holds float16
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.compute = "auto"
    rounding = error(engine_logits(tmp_path / "a.gguf", "int8"), expected)  # 1% a layer adds up
    assert error(logits(model), expected) <= 1.5 * rounding


def test_the_files_bytes_lie_in_the_layers(folders: dict[str, Path], tmp_path: Path) -> None:
    aq.convert(folders["gpt2"], tmp_path / "a.gguf")
    model = gpt2()
    load_gguf(model, tmp_path / "a.gguf")
    tensors = read_tensors(tmp_path / "a.gguf")
    layer = model.transformer.h[1].attn.c_attn
    assert layer.weight.numpy().tobytes() == tensors["blk.1.attn_qkv.weight"][2]
    assert model.transformer.wte.weight.numpy().tobytes() == tensors["token_embd.weight"][2]
    assert model.lm_head.packed is model.transformer.wte.packed
    assert isinstance(model.transformer.wpe, nn.Embedding)


def test_the_example_sized_model(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "az_llm_small"
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    dense = copy.deepcopy(model)
    report = quantize_(model)
    aq.convert(folder, tmp_path / "a.gguf")
    save_gguf(model, tmp_path / "b.gguf", folder=folder)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    linears = [row for row in report.replaced if row.kind == "Conv1D"]
    assert sum(row.after for row in linears) <= 0.16 * sum(row.before for row in linears)
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        assert error(model(ids).logits, dense(ids).logits) < 0.1
        assert model.generate(ids[:, :9], max_new_tokens=8, do_sample=False, pad_token_id=0).shape == (1, 17)


def test_a_saved_file_of_the_config_alone_loads(tmp_path: Path) -> None:
    model = gpt2()
    quantize_(model)
    save_gguf(model, tmp_path / "my-model.gguf")
    with open_gguf(tmp_path / "my-model.gguf") as file:
        assert file.metadata["general.architecture"] == "gpt2"
        assert "tokenizer.ggml.model" not in file.metadata
    other = gpt2()
    load_gguf(other, tmp_path / "my-model.gguf")
    assert torch.equal(logits(other), logits(model))


def test_untied_and_tied_heads(tmp_path: Path) -> None:
    untied = gpt2(tie_word_embeddings=False)
    report = quantize_(untied)
    assert untied.lm_head.tied_to is None
    assert {row.name: row.type for row in report.rows if "h." not in row.name} == {
        "transformer.wte": "q4_0", "transformer.wpe": "", "lm_head": "q8_0",
    }  # fmt: skip
    save_gguf(untied, tmp_path / "a.gguf")
    # A file with its own head into a model that ties it: both are kept, and apart.
    tied = gpt2()
    load_gguf(tied, tmp_path / "a.gguf")
    assert tied.lm_head.packed is not tied.transformer.wte.packed
    assert torch.equal(logits(tied), logits(untied))
    dense = gpt2()
    dense.lm_head.weight = nn.Parameter(torch.randn(257, 64))
    dense.config.tie_word_embeddings = False
    save_gguf(dense, tmp_path / "f32.gguf")
    again = gpt2()
    load_gguf(again, tmp_path / "f32.gguf")
    assert torch.equal(again.lm_head.weight, dense.lm_head.weight)
    assert torch.equal(again.transformer.wte.weight, dense.transformer.wte.weight)


def test_equal_copies_of_one_matrix_are_stored_once() -> None:
    model = gpt2(tie_word_embeddings=False)
    model.lm_head.weight.data.copy_(model.transformer.wte.weight)
    quantize_(model)
    assert model.lm_head.tied_to is model.transformer.wte
    assert model.transformer.wte.quant_type == "q8_0"


@pytest.mark.filterwarnings("ignore::azquant.errors.ConversionWarning")
@pytest.mark.parametrize("type", ["q4_0", "q4_k_m", "q5_0"])
def test_mixtures_are_llama_quantizes(tmp_path: Path, type: str) -> None:
    """Rows that superblocks fit: the head in q6_k, and what else the mixture raises."""
    sizes = {"n_embd": 256, "n_inner": 512, "n_layer": 4}
    folder = tiny_models.save(gpt2(**sizes), tmp_path / "hf")
    aq.convert(folder, tmp_path / "a.gguf", type)
    model = gpt2(**sizes)
    report = quantize_(model, type, compute="int8" if type == "q4_0" else "auto")
    assert "q6_k" in {row.type for row in report.rows}
    save_gguf(model, tmp_path / "b.gguf", folder=folder)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert error(logits(model), logits(dequantized(model))) <= 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: Any, tmp_path: Path) -> None:
    model = gpt2().to(dtype)
    dense = copy.deepcopy(model)
    quantize_(model)
    found = logits(model)
    assert found.dtype is dtype
    assert error(found.float(), logits(dense).float()) < 0.5
    save_gguf(model, tmp_path / "half.gguf")
    assert read_tensors(tmp_path / "half.gguf")["blk.0.attn_qkv.weight"][1] == "Q4_0"


def test_rows_that_fit_no_block_stay_dense_and_are_reported(tmp_path: Path) -> None:
    model = gpt2(n_inner=100)
    report = quantize_(model)
    kept = {row.name: row.reason for row in report.kept}
    assert kept["transformer.h.0.mlp.c_proj"] == "rows of 100 are no whole number of q4_0 blocks (32)"
    assert "rows of 100" in str(report)
    folder = tiny_models.save(gpt2(n_inner=100), tmp_path / "hf")
    with pytest.warns(ConversionWarning, match="rows of 100"):
        aq.convert(folder, tmp_path / "a.gguf")
    save_gguf(model, tmp_path / "b.gguf", folder=folder)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


# ---- choosing layers ---------------------------------------------------------------------------------


def plain() -> Any:
    """No transformers model: nothing says which embedding is which."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.embed = nn.Embedding(40, 64)
    model.shared = nn.Linear(64, 64)
    model.again = model.shared
    model.out = nn.Linear(64, 40, bias=False)
    model.out.weight = model.embed.weight
    model.attention = nn.MultiheadAttention(64, 4)
    return model


def test_shared_modules_tied_weights_and_subclasses() -> None:
    model = plain()
    report = quantize_(model)
    assert model.shared is model.again
    assert isinstance(model.shared, QuantLinear)
    assert model.out.tied_to is model.embed
    rows = {row.name: row for row in report.rows}
    assert rows["embed"].type == rows["out"].type == "q8_0"
    assert rows["out"].after == rows["out"].before == rows["again"].after == 0
    assert "NonDynamicallyQuantizableLinear" in rows["attention.out_proj"].reason
    model.attention(*[torch.randn(3, 1, 64)] * 3)


def test_the_report_adds_up() -> None:
    model = gpt2()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = quantize_(model, head="q4_0")
    row = next(row for row in report.rows if row.name == "transformer.h.0.mlp.c_fc")
    layer = model.get_submodule(row.name)
    dense = before[row.name + ".weight"].T
    assert (row.kind, row.shape, row.type) == ("Conv1D", (160, 64), "q4_0")
    assert row.before == dense.nbytes
    assert row.after == layer.packed.nbytes
    assert row.error == pytest.approx(error(layer.dequantize(), dense), rel=1e-5)
    assert report.after == sum(
        {m.packed.data_ptr(): m.packed.nbytes for m in model.modules() if hasattr(m, "packed")}.values()
    )
    assert report.after <= 0.16 * report.before
    assert f"{report.before:,} -> {report.after:,} bytes" in str(report)


def test_filter_and_skip() -> None:
    model = gpt2()
    report = quantize_(model, skip=("*.c_attn", "lm_head"))
    reasons = {row.name: row.reason for row in report.kept}
    assert reasons["transformer.h.1.attn.c_attn"] == reasons["lm_head"] == "skip"
    assert reasons["transformer.wte"] == "shares its weight with transformer.wte: skip"
    assert {row.name.split(".")[-1] for row in report.replaced} == {"c_proj", "c_fc"}
    model = plain()
    quantize_(model, "q8_0", filter=lambda module, name: isinstance(module, nn.Embedding) or name == "out")
    assert isinstance(model.embed, QuantEmbedding)
    assert isinstance(model.shared, nn.Linear)


def test_quantizing_twice_changes_nothing_more() -> None:
    model = gpt2()
    quantize_(model)
    before = logits(model)
    assert [row.name for row in quantize_(model).rows] == ["transformer.wpe"]
    assert torch.equal(logits(model), before)


# ---- refusals ----------------------------------------------------------------------------------------


def test_nothing_is_changed_when_one_layer_cannot_be(tmp_path: Path) -> None:
    model = gpt2()
    model.transformer.h[1].mlp.c_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(NonFiniteError, match=r"transformer\.h\.1\.mlp\.c_proj\.weight.*nan"):
        quantize_(model)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    with torch.device("meta"):
        empty = gpt2_on_meta()
    with pytest.raises(ArgumentError, match="meta device"):
        quantize_(empty)
    with pytest.raises(ArgumentError, match="on meta"):
        save_gguf(empty, tmp_path / "a.gguf")


def gpt2_on_meta() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=257, **GPT2))


def test_quantize_refusals() -> None:
    with pytest.raises(ArgumentError, match="itself one layer"):
        quantize_(nn.Linear(32, 32))
    with pytest.raises(ArgumentError, match="'lm_haed' fits no"):
        quantize_(gpt2(), skip=("lm_haed",))
    with pytest.raises(UnsupportedTypeError):
        quantize_(gpt2(), "q9_9")


def test_load_refusals(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    aq.convert(folders["gpt2"], path)
    before = {name: p.clone() for name, p in gpt2().named_parameters()}
    for model, message in [
        (tiny_models.build("smollm"), "holds a gpt2 model, but the module is a llama"),
        (gpt2(n_layer=3), "block_count is 2, but the module's config says 3"),
        (gpt2(n_inner=128), "feed_forward_length is 160"),
        (gpt2(layer_norm_epsilon=1e-3), "norm_epsilon"),
    ]:
        with pytest.raises(ModelError, match=message):
            load_gguf(model, path)
    with pytest.raises(ArgumentError, match="transformers model is needed"):
        load_gguf(nn.Linear(2, 2), path)
    with pytest.raises(ConversionError, match="gemma2 models cannot"):
        load_gguf(tiny_models.build("gemma2"), path)
    with open_gguf(path) as file:  # a tensor gone
        from azquant.gguf import TensorSpec

        kept = [t for t in file.tensors.values() if t.name != "blk.1.ffn_up.weight"]
        specs = [TensorSpec(t.name, t.shape, t.type) for t in kept]
        write_gguf(tmp_path / "b.gguf", file.copy_metadata(), specs, lambda s: [file.tensors[s.name].data])
    model = gpt2()
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight is missing"):
        load_gguf(model, tmp_path / "b.gguf")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_save_refusals(folders: dict[str, Path], tmp_path: Path) -> None:
    model = gpt2()
    with pytest.raises(ArgumentError, match="give one"):
        save_gguf(model, tmp_path / "a.gguf", folder=folders["gpt2"], like=tmp_path / "b.gguf")
    (tmp_path / "old.gguf").write_bytes(b"old")
    with pytest.raises(OutputError):
        save_gguf(model, tmp_path / "old.gguf")
    assert (tmp_path / "old.gguf").read_bytes() == b"old"
    scaled = gpt2(scale_attn_by_inverse_layer_idx=True)
    quantize_(scaled)
    with pytest.raises(
        ConversionError, match=r"blk\.1\.attn_qkv\.weight.*values changed.*convert the checkpoint"
    ):
        save_gguf(scaled, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


# ---- adapters ----------------------------------------------------------------------------------------


def llama_cpp_tokens(path: Path, adapter: Path | None, prompt: list[int]) -> list[int]:
    request = {"prompt": prompt, "n_predict": 12, "return_tokens": True, "ignore_eos": True}
    (answer,) = llama_cpp(path, request, adapter=adapter)
    found: list[int] = answer["tokens"]
    return found


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_llama_cpp_applies_the_adapter(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Its tokens with the adapter are transformers' with the merged weights, and not the base's."""
    aq.convert(folders[name], tmp_path / "base.gguf", "f32")
    model = build(name)
    part = "attn.c_attn" if name == "gpt2" else "self_attn.q_proj"
    targets = [n for n, _ in model.named_modules() if n.endswith(part)]
    factors = {}
    torch.manual_seed(1)
    for target in targets:
        weight = model.get_submodule(target).weight
        out, inner = weight.shape[::-1] if name == "gpt2" else weight.shape
        a, b = torch.randn(4, inner) * 0.3, torch.randn(out, 4) * 0.3
        factors[target] = a, b
        change = 8 / 4 * (b @ a)
        weight.data += change.T if name == "gpt2" else change
    save_lora_gguf(model, tmp_path / "adapter.gguf", factors, alpha=8)
    prompt = tiny_models.tokens(6)
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None
    )[0, 6:].tolist()
    with_adapter = llama_cpp_tokens(tmp_path / "base.gguf", tmp_path / "adapter.gguf", prompt)
    assert with_adapter == expected
    assert with_adapter != llama_cpp_tokens(tmp_path / "base.gguf", None, prompt)


def test_adapter_refusals(tmp_path: Path) -> None:
    model = gpt2()
    a, b = torch.zeros(4, 64), torch.zeros(192, 4)
    with pytest.raises(ArgumentError, match=r"transformer\.wte is no linear layer"):
        save_lora_gguf(model, tmp_path / "a.gguf", {"transformer.wte": (a, b)}, 1)
    with pytest.raises(ShapeError, match=r"h\.0\.attn\.c_attn: A \(192, 4\)"):
        save_lora_gguf(model, tmp_path / "a.gguf", {"transformer.h.0.attn.c_attn": (b, a)}, 1)


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe"])
def test_mixtures_of_experts_are_refused(name: str, tmp_path: Path) -> None:
    model = tiny_models.build(name)
    with pytest.raises(ConversionError, match="convert the checkpoint instead"):
        save_gguf(model, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
