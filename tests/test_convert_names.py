"""Names, versions and provenance of converted files; the Modelfile, by Ollama's grammar; its preflight."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from convert_support import (
    GPT2_CONFIG,
    LLAMA_CONFIG,
    gpt2_tensors,
    llama_tensors,
    read_metadata,
    write_checkpoint,
)
from tiny_models import VOCAB_SIZE, byte_tokenizer

from azquant.conversion import check_for_ollama, convert, modelfile_text, write_modelfile
from azquant.errors import ArgumentError, ModelError, OutputError
from azquant.gguf import MetadataValue, TensorSpec, ValueType, keys, open_gguf, write_gguf

pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer:azquant.errors.ConversionWarning")

CARD = """---
license: apache-2.0
language: [az, tr]
base_model:
  - LocalDoc/az-base-134m
  - /home/me/model
---
"""


def checkpoint(folder: Path, **change: Any) -> Path:
    config = {**GPT2_CONFIG, "vocab_size": VOCAB_SIZE, "eos_token_id": 256, **change}
    write_checkpoint(folder, config, gpt2_tensors(config))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}', encoding="utf-8")
    return folder


# ---- names


@pytest.mark.parametrize(
    ("folder", "version", "kind", "name"),
    [
        ("az-llm-134m", None, "q4_0", "az-llm-93K-v1.0-Q4_0.gguf"),
        ("az-llm-134m", "v1.1", "q8_0", "az-llm-93K-v1.1-Q8_0.gguf"),
        ("az-llm-134m", "2.0.1", "f16", "az-llm-93K-v2.0.1-F16.gguf"),
        ("az-llm-134m-chat-v3", None, "q4_0", "az-llm-93K-chat-v3-Q4_0.gguf"),
        ("my model (final)", None, "q4_0", "My-Model-Final-93K-v1.0-Q4_0.gguf"),
    ],
)
def test_default_name(tmp_path: Path, folder: str, version: str | None, kind: str, name: str) -> None:
    report = convert(checkpoint(tmp_path / folder), tmp_path, kind, version=version)
    assert report.destination == tmp_path / name
    assert report.destination.is_file()
    found = read_metadata(report.destination)
    said = {key: found[f"general.{key}"][1] for key in ("name", "size_label") if f"general.{key}" in found}
    parts = [found.get(f"general.{key}", ("", None))[1] for key in ("basename", "finetune", "version")]
    base, finetune, stated = parts
    upstream = gguf.naming_convention(
        said["name"], base, finetune, stated or "v1.0", said["size_label"], kind
    )
    assert re.sub(r"[()]", "", upstream) == name.removesuffix(".gguf")


def test_default_folder_is_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = convert(checkpoint(tmp_path / "az"))
    assert report.destination == Path("Az-93K-v1.0-Q4_0.gguf")
    with pytest.raises(OutputError, match="already exists"):
        convert(tmp_path / "az")


def test_dry_run_tells_the_name(tmp_path: Path) -> None:
    report = convert(checkpoint(tmp_path / "az"), tmp_path, dry_run=True)
    assert report.destination == tmp_path / "Az-93K-v1.0-Q4_0.gguf"
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize("version", ["", "one", "v", "1.", "1..2", "v1-beta", "1/2"])
def test_a_version_that_is_none(tmp_path: Path, version: str) -> None:
    with pytest.raises(ArgumentError, match="version"):
        convert(checkpoint(tmp_path / "az"), tmp_path / "out.gguf", version=version)


def test_provenance(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "az-llm-134m-v1.0")
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 0.9}), encoding="utf-8"
    )
    convert(folder, tmp_path / "out.gguf", version="1.1")
    found = {key: value for key, (_, value) in read_metadata(tmp_path / "out.gguf").items()}
    weights = (folder / "model.safetensors").read_bytes()
    expected = {
        "general.basename": "az-llm",
        "general.version": "v1.1",
        "general.size_label": "93K",
        "general.license": "apache-2.0",
        "general.languages": ["az", "tr"],
        "general.base_model.count": 1,
        "general.base_model.0.name": "Az Base 134m",
        "general.base_model.0.organization": "LocalDoc",
        "general.base_model.0.repo_url": "https://huggingface.co/LocalDoc/az-base-134m",
        "general.sampling.temp": np.float32(0.7),
        "general.sampling.top_k": 40,
        "general.sampling.top_p": np.float32(0.9),
        "azquant.source.files": ["model.safetensors"],
        "azquant.source.sha256": [hashlib.sha256(weights).hexdigest()],
    }
    assert {key: found.get(key) for key in expected} == expected


def test_split_files(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "az")
    whole = convert(folder, tmp_path / "whole.gguf")
    report = convert(folder, tmp_path / "az.gguf", split_max_size=40_000)
    assert report.destination.name == "az-00001-of-00002.gguf"
    shards = sorted(tmp_path.glob("az-0000*.gguf"))
    assert len(shards) == 2
    assert report.file_bytes == sum(path.stat().st_size for path in shards)
    with open_gguf(report.destination) as split, open_gguf(whole.destination) as one:
        assert {t.name: bytes(t.data) for t in split.tensors.values()} == {
            t.name: bytes(t.data) for t in one.tensors.values()
        }
    assert any("several files" in problem for problem in check_for_ollama(report.destination))
    small = convert(folder, tmp_path / "small.gguf", split_max_size=1 << 30)
    assert small.destination == tmp_path / "small.gguf"
    with pytest.raises(ArgumentError, match="split_max_size is 0"):
        convert(folder, tmp_path / "none.gguf", split_max_size=0)


# ---- command line


def test_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from azquant.cli import cli

    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "az-llm-134m")
    result = CliRunner().invoke(cli, ["convert", "az-llm-134m", "--version", "v1.1", "--modelfile"])
    assert result.exit_code == 0, result.output
    assert "az-llm-93K-v1.1-Q4_0.gguf" in result.output
    values = check_modelfile((tmp_path / "Modelfile").read_text(encoding="utf-8"))
    assert values["FROM"] == ["./az-llm-93K-v1.1-Q4_0.gguf"]
    result = CliRunner().invoke(cli, ["convert", "az-llm-134m", "x.gguf", "--split-max-size", "40k"])
    assert result.exit_code == 0, result.output
    assert len(list(tmp_path.glob("x-0000*-of-00002.gguf"))) == 2


# ---- Modelfile

PARAMETERS = {
    "num_ctx": int, "repeat_last_n": int, "repeat_penalty": float, "temperature": float, "seed": int,
    "stop": str, "num_predict": int, "top_k": int, "top_p": float, "min_p": float,
}  # fmt: skip
"""docs/modelfile.md of Ollama, "Valid Parameters and Values"."""


INSTRUCTION = re.compile(
    r"(?P<name>FROM|TEMPLATE|SYSTEM|LICENSE|ADAPTER|PARAMETER (?P<parameter>\w+)) "
    r'(?:"""(?P<long>.*?)"""|"(?P<quoted>[^\n]*)"|(?P<plain>[^\n"][^\n]*))\n',
    re.DOTALL,
)


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """(instruction or parameter, value) by the documented grammar: plain, quoted, or in three quotes."""
    found = []
    rest = text.lstrip()
    while rest:
        comment = re.match(r"#[^\n]*\n", rest)
        match = comment or INSTRUCTION.match(rest)
        assert match is not None, rest
        if match is not comment:
            value = next(v for v in match.group("long", "quoted", "plain") if v is not None)
            found.append((match["parameter"] or match["name"], value))
        rest = rest[match.end() :].lstrip()
    return found


def check_modelfile(text: str) -> dict[str, list[str]]:
    """The values of each instruction, parameters by their names; asserts what the documentation asks."""
    values: dict[str, list[str]] = {}
    for instruction, value in parse_modelfile(text):
        if instruction.islower():
            PARAMETERS[instruction](value)
        values.setdefault(instruction, []).append(value)
    assert len(values["FROM"]) == 1
    for template in values.get("TEMPLATE", []):
        assert template.count("{{") == template.count("}}") > 0
        opened = len(re.findall(r"{{-? ?(?:range|if)\b", template))
        assert opened == len(re.findall(r"{{-? ?end\b", template))
    return values


def test_modelfile_of_a_base_model(tmp_path: Path) -> None:
    convert(checkpoint(tmp_path / "az"), tmp_path / "az.gguf")
    path = write_modelfile(tmp_path / "az.gguf")
    assert path == tmp_path / "Modelfile"
    assert check_modelfile(path.read_text(encoding="utf-8")) == {
        "FROM": ["./az.gguf"],
        "TEMPLATE": ["{{ .Prompt }}"],
        "stop": ["<|endoftext|>"],
        "num_ctx": ["16"],
        "temperature": ["0.8"],
    }
    assert check_for_ollama(tmp_path / "az.gguf") == []
    with pytest.raises(OutputError, match="already exists"):
        write_modelfile(tmp_path / "az.gguf")
    write_modelfile(tmp_path / "az.gguf", overwrite=True, temperature=0, num_ctx=8)
    values = check_modelfile(path.read_text(encoding="utf-8"))
    assert (values["temperature"], values["num_ctx"]) == (["0"], ["8"])


def test_modelfile_elsewhere_names_the_whole_path(tmp_path: Path) -> None:
    convert(checkpoint(tmp_path / "az"), tmp_path / "az.gguf")
    (tmp_path / "other").mkdir()
    path = write_modelfile(tmp_path / "az.gguf", tmp_path / "other" / "Modelfile")
    values = check_modelfile(path.read_text(encoding="utf-8"))
    assert values["FROM"] == [str((tmp_path / "az.gguf").resolve())]


@pytest.mark.parametrize(
    ("chat", "starts", "stop"),
    [
        ("{{ '<|im_start|>' + m + '<|im_end|>' }}", "<|im_start|>", "<|im_end|>"),
        ("<|start_header_id|><|eot_id|>", "<|start_header_id|>", "<|eot_id|>"),
        ("<start_of_turn><end_of_turn>", "<start_of_turn>", "<end_of_turn>"),
        ("<|user|><|end|><|assistant|>", "<|", "<|end|>"),
        ("[INST] [/INST]", "", "[INST]"),
    ],
)
def test_modelfile_of_a_chat_model(chat: str, starts: str, stop: str) -> None:
    metadata = {
        "general.architecture": "gpt2", "gpt2.context_length": 32, "tokenizer.chat_template": chat,
        "tokenizer.ggml.tokens": ["a", "</s>"], "tokenizer.ggml.eos_token_id": 1,
    }  # fmt: skip
    values = check_modelfile(modelfile_text(metadata, "x.gguf"))
    (template,) = values["TEMPLATE"]
    assert "range .Messages" in template and starts in template
    assert stop in values["stop"] and "</s>" in values["stop"]


def test_an_unknown_chat_format_is_left_to_ollama() -> None:
    metadata = {
        "general.architecture": "gpt2", "gpt2.context_length": 32, "tokenizer.chat_template": "{{ strange }}",
    }  # fmt: skip
    text = modelfile_text(metadata, "x.gguf")
    assert "TEMPLATE" not in check_modelfile(text)
    assert "# The chat template" in text


@pytest.mark.parametrize("end", ['"', 'a"b', "\u2028", "\x07", " x", '"""'])
def test_end_tokens_that_are_awkward_to_write(end: str) -> None:
    metadata = {
        "general.architecture": "gpt2", "gpt2.context_length": 32,
        "tokenizer.ggml.tokens": [end], "tokenizer.ggml.eos_token_id": 0,
    }  # fmt: skip
    values = check_modelfile(modelfile_text(metadata, "x.gguf"))
    assert values.get("stop", [end]) == [end]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_ctx": 33}, ArgumentError),
        ({"num_ctx": 0}, ArgumentError),
        ({"temperature": -1.0}, ArgumentError),
        ({"temperature": float("nan")}, ArgumentError),
    ],
)
def test_numbers_a_modelfile_cannot_have(options: dict[str, Any], error: type[Exception]) -> None:
    metadata = {"general.architecture": "gpt2", "gpt2.context_length": 32}
    with pytest.raises(error):
        modelfile_text(metadata, "x.gguf", **options)
    with pytest.raises(ModelError, match="context length"):
        modelfile_text({"general.architecture": "gpt2"}, "x.gguf")
    with pytest.raises(ArgumentError, match="cannot name"):
        modelfile_text(metadata, "x\n.gguf")


# ---- preflight


def problems(path: Path, change: dict[str, Any], *, without: str = "") -> str:
    """What the preflight says of a good file with ``change`` (None removes a key) and without a tensor."""
    with open_gguf(path) as file:
        specs = [TensorSpec(t.name, t.shape, t.type) for t in file.tensors.values() if t.name != without]
        data = {t.name: bytes(t.data) for t in file.tensors.values()}
        old = dict(file.metadata)
    written = {key: _value(value) for key, value in {**old, **change}.items() if value is not None}
    broken = path.with_name("broken.gguf")
    write_gguf(broken, written, specs, lambda spec: [data[spec.name]], overwrite=True)
    return "\n".join(check_for_ollama(broken))


def _value(value: Any) -> MetadataValue:
    if isinstance(value, bool):
        return keys.boolean(value)
    if isinstance(value, int):
        return keys.u32(value)
    if isinstance(value, float):
        return keys.f32(value)
    if isinstance(value, str):
        return keys.string(value)
    items = list(value)
    return keys.array(ValueType.INT32 if items and isinstance(items[0], int) else ValueType.STRING, items)


def test_preflight(tmp_path: Path) -> None:
    path = tmp_path / "az.gguf"
    convert(checkpoint(tmp_path / "az"), path)
    assert problems(path, {}) == ""
    assert "no_vocab" in problems(path, {"tokenizer.ggml.model": "no_vocab"})
    assert "no_vocab" in problems(path, {"tokenizer.ggml.model": None})
    assert "tokens is missing" in problems(path, {"tokenizer.ggml.tokens": None})
    assert "tokenizer.ggml.pre is missing" in problems(path, {"tokenizer.ggml.pre": None})
    assert "eos_token_id" in problems(path, {"tokenizer.ggml.eos_token_id": None})
    assert "eos_token_id" in problems(path, {"tokenizer.ggml.eos_token_id": 999})
    assert "'a' more than once" in problems(path, {"tokenizer.ggml.tokens": ["a"] * VOCAB_SIZE})
    assert "context_length is missing" in problems(path, {"gpt2.context_length": None})
    assert "general.architecture is missing" in problems(path, {"general.architecture": None})
    assert "'rwkv7' is not known" in problems(path, {"general.architecture": "rwkv7"})
    assert "blk.0.attn_qkv.bias is missing" in problems(path, {}, without="blk.0.attn_qkv.bias")
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    assert len(check_for_ollama(tmp_path / "no.gguf")) == 1


def test_a_llama_without_tokenizer_is_told(tmp_path: Path) -> None:
    convert(
        write_checkpoint(tmp_path / "hf", LLAMA_CONFIG, llama_tensors(LLAMA_CONFIG)), tmp_path / "out.gguf"
    )
    (problem,) = check_for_ollama(tmp_path / "out.gguf")
    assert "no_vocab" in problem
