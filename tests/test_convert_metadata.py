"""The general and tokenizer keys of a conversion are those of llama.cpp's converter, but for a known few."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GOLDEN = Path(__file__).resolve().parent / "golden"
sys.path.insert(0, str(GOLDEN))

from make_llama_cpp_metadata import described  # noqa: E402
from metadata_cases import CASES  # noqa: E402

from azquant.conversion import convert  # noqa: E402

UPSTREAM: dict[str, dict[str, list[Any]]] = json.loads(
    (GOLDEN / "llama_cpp_metadata.json").read_text(encoding="utf-8")
)

# What is written beyond the other converter's keys, and what is written otherwise;
# azquant.conversion.metadata gives the reasons. ``...``: too long to stand here, see the end of the test.
HERE: dict[str, dict[str, Any]] = {
    "gpt2": {
        "general.finetune": "chat",  # 134m-chat there
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.huggingface.json": ...,
    },
    "llama3": {
        "general.finetune": "Instruct",
        "tokenizer.huggingface.json": ...,
    },
    "qwen2": {
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.huggingface.json": ...,
    },
    "mixtral": {
        "tokenizer.huggingface.json": ...,
    },
    "sentencepiece": {
        "general.basename": "Mini-Llama-2",
        "general.version": "v2",
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.scores": ...,
        "tokenizer.huggingface.json": ...,
    },
    "json sentencepiece": {
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.scores": ...,
        "tokenizer.ggml.token_type": ...,
        "tokenizer.huggingface.json": ...,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_keys_and_values_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    write, _ = CASES[name]
    folder = write(tmp_path)
    convert(folder, tmp_path / "out.gguf", "f16")
    found, expected = described(tmp_path / "out.gguf"), UPSTREAM[name]
    different = {key for key in {*found, *expected} if found.get(key) != expected.get(key)}
    assert different == set(HERE[name])
    for key, value in HERE[name].items():
        if value is not ...:
            assert found[key][1] == value
        elif key in expected:
            assert found[key][0] == expected[key][0]  # the type
    assert json.loads(str(found["tokenizer.huggingface.json"][1]))["model"]["vocab"]
    if "tokenizer.ggml.token_type" in HERE[name]:
        ours, theirs = (np.array(side["tokenizer.ggml.token_type"][1]) for side in (found, expected))
        assert np.flatnonzero(ours != theirs).tolist() == [0]
        assert (ours[0], theirs[0]) == (2, 3)
    if name == "sentencepiece":
        ours, theirs = (np.array(side["tokenizer.ggml.scores"][1]) for side in (found, expected))
        merged = ours > -1e9
        assert 0 < merged.sum() < len(ours)
        assert np.argsort(ours[merged]).tolist() == np.argsort(theirs[merged]).tolist()


def test_greedy_decoding_says_nothing_of_sampling(tmp_path: Path) -> None:
    folder = CASES["gpt2"][0](tmp_path)
    path = folder / "generation_config.json"
    path.write_text(path.read_text().replace('"do_sample": true', '"do_sample": false'))
    convert(folder, tmp_path / "out.gguf", "f16")
    assert not [key for key in described(tmp_path / "out.gguf") if key.startswith("general.sampling")]
