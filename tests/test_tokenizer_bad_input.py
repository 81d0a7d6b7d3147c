"""Tokenizers and tokenizer files that are wrong: one error each, of azquant's own."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_support import (
    EOS,
    PROSE,
    TEMPLATE,
    as_json,
    byte_level_metadata,
    convert,
    convert_warned,
    plain,
    save,
    sentencepiece_metadata,
    train,
)

from azquant.errors import AzquantError, ModelError, TokenizerError
from azquant.gguf import keys
from azquant.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    return as_json(train())


@pytest.fixture(scope="module")
def oracle() -> tokenizers.Tokenizer:
    return train()


@pytest.fixture(scope="module")
def rebuilt(oracle: tokenizers.Tokenizer) -> Tokenizer:
    """The tokenizer from tokenizer.ggml.* alone."""
    return load_tokenizer(byte_level_metadata(oracle))


# Files of a Hugging Face folder


def _set(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    content = copy.deepcopy(content)
    *way, last = path.split(".")
    node: Any = content
    for step in way:
        node = node[int(step)] if step.isdigit() else node[step]
    node[int(last) if last.isdigit() else last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        ("model", None, "model"),
        ("model", [], "model"),
        ("model.vocab", None, r"model\.vocab"),
        ("model.vocab", "x", r"model\.vocab"),
        ("model.vocab", [["a", 0.0]], r"model\.vocab"),
        ("model.vocab.a", "5", r"model\.vocab\['a'\]"),
        ("model.vocab.a", True, r"model\.vocab\['a'\]"),
        ("model.vocab.a", 1.0, r"model\.vocab\['a'\]"),
        ("model.vocab.a", -1, r"model\.vocab\['a'\]"),
        ("model.vocab.a", 10**30, r"model\.vocab\['a'\]"),
        ("model.vocab.\ud800", 425, "lone surrogate"),
        ("model.merges", "a b", r"model\.merges"),
        ("model.merges.2", 5, r"model\.merges\[2\]"),
        ("model.merges.2", "a", r"model\.merges\[2\]"),
        ("model.merges.2", "a b c", r"model\.merges\[2\]"),
        ("model.merges.2", ["a"], r"model\.merges\[2\]"),
        ("model.merges.2", ["a", 5], r"model\.merges\[2\]"),
        ("model.merges.2", ["a", ""], r"model\.merges\[2\]"),
        ("model.merges.2", ["qx", "qy"], r"model\.merges\[2\].*'qx', which is not in model\.vocab"),
        ("added_tokens", {}, "added_tokens"),
        ("added_tokens.0", "x", r"added_tokens\[0\]"),
        ("added_tokens.0.content", None, r"added_tokens\[0\]\.content"),
        ("added_tokens.0.id", "0", r"added_tokens\[0\]\.id"),
        ("added_tokens.0.id", -5, r"added_tokens\[0\]\.id"),
        ("pre_tokenizer", "ByteLevel", "pre_tokenizer"),
        ("normalizer", [1], "normalizer"),
        ("post_processor", "x", "post_processor"),
        ("post_processor", {"type": "Sequence", "processors": 1}, r"post_processor\.processors"),
        ("post_processor", {"type": "TemplateProcessing", "single": [5]}, r"post_processor\.single\[0\]"),
        ("post_processor", {"type": "RobertaProcessing", "cls": []}, r"post_processor\.cls"),
    ],
)
def test_refuses_wrong_types_naming_the_key(
    tmp_path: Path, trained: dict[str, Any], path: str, value: Any, key: str
) -> None:
    folder = save(tmp_path, _set(trained, path, value), tokenizer_config=EOS)
    with pytest.raises(TokenizerError, match=rf"tokenizer\.json.*{key}"):
        convert_warned(folder, 430)


@pytest.mark.parametrize(
    ("name", "content", "key"),
    [
        ("tokenizer_config", {"eos_token": 5}, "eos_token"),
        ("tokenizer_config", {"eos_token": {"content": 5}}, "eos_token"),
        ("tokenizer_config", {"chat_template": 5}, "chat_template"),
        ("tokenizer_config", {"chat_template": [{"name": "a"}]}, r"chat_template\[0\]\.template"),
        ("tokenizer_config", {"chat_template": "\ud800"}, "surrogate"),
        ("tokenizer_config", {"added_tokens_decoder": []}, "added_tokens_decoder"),
        (
            "tokenizer_config",
            {"added_tokens_decoder": {"x": {"content": "y"}}},
            r"added_tokens_decoder\['x'\]",
        ),
        ("tokenizer_config", {"added_tokens_decoder": {"5": {}}}, r"added_tokens_decoder\['5'\]\.content"),
        ("special_tokens_map", {"bos_token": []}, "bos_token"),
        ("generation_config", {"eos_token_id": "x"}, "eos_token_id"),
        ("generation_config", {"eos_token_id": [True]}, "eos_token_id"),
        ("added_tokens", {"<x>": "7"}, "<x>"),
    ],
)
def test_refuses_wrong_types_in_the_other_files(
    tmp_path: Path, trained: dict[str, Any], name: str, content: Any, key: str
) -> None:
    folder = save(tmp_path, trained, **{name: content})
    with pytest.raises(TokenizerError, match=rf"(?s){key}"):
        convert_warned(folder)


def test_refuses_a_wrong_id_in_the_config(tmp_path: Path, trained: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError, match=r"config\.json: eos_token_id must be a token id"):
        convert(save(tmp_path, trained), eos_token_id="50256")


NOT_JSON = {
    "empty": b"",
    "truncated": b'{"model": {"vocab": {"a": 0',
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "a list": b"[]",
    "null": b"null",
    "NaN": b'{"model": NaN}',
    "deep": b"[" * 200_000,
    "deep object": b'{"a":' * 200_000,
    "huge number": b'{"a": ' + b"9" * 5000 + b"}",
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
}


@pytest.mark.parametrize(
    "name", ["tokenizer", "tokenizer_config", "special_tokens_map", "generation_config", "added_tokens"]
)
@pytest.mark.parametrize("case", NOT_JSON)
def test_refuses_what_is_no_json_object(
    tmp_path: Path, trained: dict[str, Any], name: str, case: str
) -> None:
    save(tmp_path, trained)
    (tmp_path / f"{name}.json").write_bytes(NOT_JSON[case])
    with pytest.raises(TokenizerError, match=rf"{name}\.json"):
        convert(tmp_path)


def test_refuses_every_truncation(tmp_path: Path, trained: dict[str, Any]) -> None:
    whole = json.dumps(trained, ensure_ascii=False).encode()
    for cut in range(0, len(whole), 97):
        (tmp_path / "tokenizer.json").write_bytes(whole[:cut])
        with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
            convert(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 500) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_change_gives_metadata_or_an_azquant_error(
    tmp_path_factory: pytest.TempPathFactory, trained: dict[str, Any], data: st.DataObject
) -> None:
    """Replace a value anywhere in the files: metadata that loads, or AzquantError, comes of it."""
    content = copy.deepcopy(trained)
    content["normalizer"] = {"type": "NFC"}
    content["post_processor"] = json.loads(TEMPLATE.__getstate__())
    files = {
        "tokenizer": content,
        "tokenizer_config": {
            **EOS,
            "added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}},
        },
        "generation_config": {"eos_token_id": [0]},
    }
    node: Any = files
    step: Any = data.draw(
        st.sampled_from(["tokenizer", "tokenizer", "tokenizer_config", "generation_config"])
    )
    while isinstance(node[step], (dict, list)) and node[step] and data.draw(st.integers(0, 5)):
        node = node[step]
        step = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
    node[step] = data.draw(JSON)
    folder = tmp_path_factory.mktemp("fuzz")
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    try:
        metadata, _ = convert_warned(folder, 440)
    except AzquantError:
        return
    tokenizer = load_tokenizer(plain(metadata))
    assert len(plain(metadata)[keys.TOKENS]) == 440
    try:
        tokenizer.encode("salam, dünya")
    except TokenizerError as error:
        assert "tokenizer.huggingface.json" in str(error)


# Metadata of a GGUF file


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (keys.BOS_TOKEN_ID, 264, "264.*264 entries"),
        (keys.EOS_TOKEN_ID, 50256, "50256.*264 entries"),
        (keys.EOS_TOKEN_ID, -1, "-1"),
        (keys.EOS_TOKEN_ID, "2", "integer, found str"),
        (keys.EOS_TOKEN_ID, True, "integer, found bool"),
        (keys.EOT_TOKEN_ID, 300, "300"),
        (keys.UNKNOWN_TOKEN_ID, 2**31, "2147483648"),
        (keys.BOS_TOKEN_ID, None, None),
        (keys.ADD_EOS_TOKEN, 1, "bool"),
        (keys.TOKENS, None, "missing or empty"),
        (keys.TOKENS, "abc", "must be an array"),
        (keys.TOKENS, [1] * 264, "str values, found int"),
        (keys.TOKEN_TYPE, [1, 2], "2 entries for 264"),
        (keys.TOKEN_TYPE, ["x"] * 264, "int values"),
        (keys.SCORES, [0.0], "1 entries for 264"),
        (keys.SCORES, ["x"] * 264, "float values"),
        (keys.TOKENIZER_MODEL, 5, "str"),
        (keys.TOKENIZER_JSON, 5, "str"),
        (keys.CHAT_TEMPLATE, ["x"], "str"),
    ],
)
def test_refuses_contradicting_metadata(key: str, value: Any, said: str | None) -> None:
    metadata = sentencepiece_metadata()
    assert load_tokenizer(metadata).encode("a") == [1, 262]
    metadata[key] = value
    if said is None:  # absent is fine: then no BOS is added either
        assert load_tokenizer(metadata).encode("a") == [262]
        return
    with pytest.raises(ModelError, match=said):
        load_tokenizer(metadata)


@pytest.mark.parametrize("text", ["<0xZZ>", "<0x-1>", "<0x1>", "<0x123>", "x", "", "<0x0A>\n", "<0x٣٤>"])
def test_refuses_malformed_byte_tokens(text: str) -> None:
    metadata = sentencepiece_metadata()
    metadata[keys.TOKENS][10] = text
    with pytest.raises(ModelError, match=r"tokens\[10\] is a byte token"):
        load_tokenizer(metadata)


def test_refuses_bos_wanted_but_not_named(oracle: tokenizers.Tokenizer) -> None:
    metadata = byte_level_metadata(oracle, **{keys.ADD_BOS_TOKEN: True})
    del metadata[keys.BOS_TOKEN_ID]
    with pytest.raises(ModelError, match="add_bos_token is true"):
        load_tokenizer(metadata)


def test_refuses_two_tokens_of_one_text(oracle: tokenizers.Tokenizer) -> None:
    metadata = byte_level_metadata(oracle)
    metadata[keys.TOKENS][7] = metadata[keys.TOKENS][9]
    with pytest.raises(ModelError, match="7 and 9 are the same token"):
        load_tokenizer(metadata).encode("a")


@pytest.mark.parametrize("merge", ["", "a", "a zzz", " ", "\udc80 a"])
def test_refuses_bad_merges(oracle: tokenizers.Tokenizer, merge: str) -> None:
    metadata = byte_level_metadata(oracle)
    metadata[keys.MERGES][0] = merge
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.merges"):
        load_tokenizer(metadata).encode("a")


@pytest.mark.parametrize("token_id", [-1, 420, 2**40])
def test_refuses_ids_outside_the_vocabulary(rebuilt: Tokenizer, token_id: int) -> None:
    for use in (rebuilt.stream_decoder().push, rebuilt.piece, rebuilt.token):
        with pytest.raises(TokenizerError, match=f"{token_id} is outside the vocabulary of 420"):
            use(token_id)
    with pytest.raises(TokenizerError):
        rebuilt.decode([5, token_id])


@pytest.mark.parametrize("text", ["a\ud800b", "\udc80", "x" * 1000 + "\udfff"])
def test_refuses_lone_surrogates(rebuilt: Tokenizer, text: str) -> None:
    with pytest.raises(TokenizerError, match="lone surrogate"):
        rebuilt.encode(text)
    with pytest.raises(TokenizerError, match="must be a str, found bytes"):
        rebuilt.encode(b"a")  # type: ignore[arg-type]


def test_tokens_that_are_no_utf8_do_not_break_decoding(oracle: tokenizers.Tokenizer) -> None:
    metadata = byte_level_metadata(oracle)
    metadata[keys.TOKENS][300] = "\udcff"  # the GGUF reader's sign for the byte 0xFF
    metadata[keys.TOKENS][301] = "\ud800"
    tokenizer = load_tokenizer(metadata)
    assert tokenizer.piece(300) == b"\xff"
    assert tokenizer.decode([300, 301]) == "\ufffd?"


def test_long_and_odd_text(rebuilt: Tokenizer) -> None:
    for tokenizer in (rebuilt, load_tokenizer(sentencepiece_metadata())):
        for text in ("a" * 300_000, "\0" * 1000, " " * 10_000, PROSE * 200):
            ids = tokenizer.encode(text, add_special=False)
            assert tokenizer.decode(ids) == text
