"""As a new user: train a tokenizer and a GPT-2 with transformers, save, one conversion, run everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_support import llama_cpp, read_metadata
from tokenizer_support import PROSE

import azquant
from azquant.conversion import check_for_ollama, write_modelfile
from azquant.errors import ConversionError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = "Azərbaycan Respublikası Cənubi Qafqazda yerləşir. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What save_pretrained leaves of a tokenizer and a GPT-2 that learned one sentence by heart."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [TEXT, PROSE] * 3,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(fast), n_positions=64, n_embd=64, n_head=4, n_layer=2,
        bos_token_id=fast.bos_token_id, eos_token_id=fast.eos_token_id,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.tensor([fast(TEXT * 4)["input_ids"][:64]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5
    path = tmp_path_factory.mktemp("user") / "az-tiny"
    model.eval().save_pretrained(path)
    fast.save_pretrained(path)
    return path


def test_one_conversion_and_it_runs(folder: Path, tmp_path: Path) -> None:
    report = azquant.convert(folder, tmp_path)
    assert report.warnings == ()
    assert check_for_ollama(report.destination) == []
    write_modelfile(report.destination)
    prompt, expected = "Azərbaycan Respublikası", " Cənubi Qafqazda yerləşir."
    answer = azquant.load(report.destination).generate(prompt, max_tokens=24)
    assert answer.startswith(expected)
    (other,) = llama_cpp(report.destination, {"prompt": prompt, "n_predict": 24}, n_ctx=64)
    assert other["content"].startswith(expected)


@pytest.mark.parametrize("more", [-1, 0, 1, 112])
def test_embedding_rows_against_the_tokenizer(folder: Path, tmp_path: Path, more: int) -> None:
    """A row too few is one readable error naming both counts; rows too many are padding."""
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    rows = model.config.vocab_size + more
    model.resize_token_embeddings(rows)
    hf = tmp_path / "hf"
    model.save_pretrained(hf)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (hf / name).write_bytes((folder / name).read_bytes())
    out = tmp_path / "out.gguf"
    if more < 0:
        with pytest.raises(ConversionError, match=f"has {rows + 1} tokens.* only {rows} rows"):
            azquant.convert(hf, out)
        assert not out.exists()
        return
    azquant.convert(hf, out)
    assert len(read_metadata(out)["tokenizer.ggml.tokens"][1]) == rows
    answer = azquant.load(out).generate("Azərbaycan", max_tokens=4)
    (other,) = llama_cpp(out, {"prompt": "Azərbaycan", "n_predict": 4}, n_ctx=64)
    assert answer and other["content"]


def test_a_fine_tuned_adapter(folder: Path, tmp_path: Path) -> None:
    """An adapter changes what is said, and the file with it merged says so."""
    from safetensors.numpy import save_file

    lora = tmp_path / "lora"
    lora.mkdir()
    random = np.random.default_rng(0)
    name = "base_model.model.transformer.h.1.mlp.c_proj.lora"
    pair: dict[str, Any] = {
        f"{name}_A.weight": random.standard_normal((4, 256), dtype=np.float32),
        f"{name}_B.weight": random.standard_normal((64, 4), dtype=np.float32),
    }
    save_file(pair, lora / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "fan_in_fan_out": True,
        "base_model_name_or_path": "me/az-tiny",
    }  # fmt: skip
    (lora / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    azquant.convert(folder, tmp_path / "plain.gguf", "f32")
    azquant.convert(folder, tmp_path / "merged.gguf", "f32", lora=lora)
    prompt = "Azərbaycan Respublikası"
    plain, merged = (
        azquant.load(tmp_path / f"{kind}.gguf").generate(prompt, max_tokens=8) for kind in ("plain", "merged")
    )
    assert plain != merged
    found = read_metadata(tmp_path / "merged.gguf")
    assert found["general.base_model.0.organization"][1] == "Me"
    assert len(found["azquant.source.files"][1]) == 2
