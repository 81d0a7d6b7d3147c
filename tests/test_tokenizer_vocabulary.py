"""The reconcile pass of a conversion: tokens, merges, special ids, what is added, chat templates."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizer_support import (
    CONTROL,
    EOS,
    NORMAL,
    PROSE,
    SPECIAL,
    TEMPLATE,
    UNUSED,
    USER_DEFINED,
    LlamaCpp,
    as_json,
    both,
    convert,
    convert_warned,
    plain,
    save,
    train,
)
from tokenizers import models, pre_tokenizers, processors, trainers

from azquant.errors import ConversionError
from azquant.gguf import keys
from azquant.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def llama_cpp() -> Iterator[LlamaCpp]:
    llama = LlamaCpp()
    yield llama
    llama.close()


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    return as_json(train())


# Vocabulary


def test_both_spellings_of_merges(tmp_path: Path, trained: dict[str, Any]) -> None:
    old = copy.deepcopy(trained)
    assert isinstance(old["model"]["merges"][0], list)
    old["model"]["merges"] = [" ".join(pair) for pair in old["model"]["merges"]]
    new_values = plain(convert(save(tmp_path / "new", trained, tokenizer_config=EOS)), keys.TOKENIZER_JSON)
    old_values = plain(convert(save(tmp_path / "old", old, tokenizer_config=EOS)), keys.TOKENIZER_JSON)
    assert new_values == old_values
    assert new_values[keys.MERGES] == old["model"]["merges"]


def test_a_merge_with_a_space_in_it_is_left_out(tmp_path: Path, trained: dict[str, Any]) -> None:
    content = copy.deepcopy(trained)
    content["model"]["vocab"] |= {" ": 420, " a": 421}
    content["model"]["merges"].insert(3, [" ", "a"])
    metadata, said = convert_warned(save(tmp_path, content, tokenizer_config=EOS), 422)
    assert "1 merges have a space in a part (the first is model.merges[3])" in said
    assert plain(metadata)[keys.MERGES] == [" ".join(pair) for pair in trained["model"]["merges"]]
    oracle = tokenizers.Tokenizer.from_str(json.dumps(content))
    for tokenizer in both(metadata):
        assert tokenizer.encode(PROSE) == oracle.encode(PROSE).ids


def test_more_rows_than_tokens(tmp_path: Path, llama_cpp: LlamaCpp, trained: dict[str, Any]) -> None:
    content = copy.deepcopy(trained)
    content["added_tokens"].append({"id": 420, "content": "[PAD422]", **SPECIAL})
    metadata = convert(save(tmp_path, content, tokenizer_config=EOS), 424)
    values = plain(metadata)
    assert values[keys.TOKENS][420:] == ["[PAD422]", "[PAD421]", "[PAD422]_", "[PAD423]"]
    assert values[keys.TOKEN_TYPE][420:] == [CONTROL, UNUSED, UNUSED, UNUSED]
    assert load_tokenizer(values).decode([421, *load_tokenizer(values).encode("a")]) == "a"
    ids = load_tokenizer(values).encode("[PAD422] [PAD421]")
    assert ids[0] == 420
    assert llama_cpp.encode(tmp_path / "a.gguf", metadata, ["[PAD422] [PAD421]"]) == [ids]


def test_fewer_rows_than_tokens_names_both_counts(tmp_path: Path, trained: dict[str, Any]) -> None:
    with pytest.raises(
        ConversionError, match=r"tokenizer\.json has 420 tokens, the model's embedding only 417 rows"
    ):
        convert(save(tmp_path, trained, tokenizer_config=EOS), 417)
    with pytest.raises(ConversionError, match="vocab_size is 0"):
        convert(tmp_path, 0)


def test_missing_ids_become_unused(tmp_path: Path, trained: dict[str, Any]) -> None:
    content = copy.deepcopy(trained)
    vocab = content["model"]["vocab"]
    last = next(token for token, token_id in vocab.items() if token_id == 419)
    vocab[last] = 425
    values = plain(convert(save(tmp_path, content, tokenizer_config=EOS), 426))
    assert values[keys.TOKENS][419:425] == [f"[PAD{token_id}]" for token_id in range(419, 425)]
    assert values[keys.TOKENS][425] == last
    assert values[keys.TOKEN_TYPE][418:] == [NORMAL, *[UNUSED] * 6, NORMAL]


def test_two_tokens_with_one_id(tmp_path: Path, trained: dict[str, Any]) -> None:
    content = copy.deepcopy(trained)
    content["model"]["vocab"]["zzz"] = 5
    metadata, said = convert_warned(save(tmp_path, content, tokenizer_config=EOS))
    first = next(token for token, token_id in trained["model"]["vocab"].items() if token_id == 5)
    assert f"{first!r} and 'zzz' both have id 5" in said
    assert plain(metadata)[keys.TOKENS][5] == first


@pytest.mark.parametrize("ids", [[420], [420, 421], [7], [430], [431, 430], [420, 420]])
def test_added_tokens_get_the_ids_that_tokenizers_gives(
    tmp_path: Path, trained: dict[str, Any], ids: list[int]
) -> None:
    content = copy.deepcopy(trained)
    names = [f"<{index}>" for index in range(len(ids))]
    content["added_tokens"] += [
        {"id": token_id, "content": name, **SPECIAL} for name, token_id in zip(names, ids, strict=True)
    ]
    metadata, said = convert_warned(save(tmp_path, content, tokenizer_config=EOS), 440)
    oracle = tokenizers.Tokenizer.from_str(json.dumps(content))
    given = [oracle.token_to_id(name) for name in names]
    assert [plain(metadata)[keys.TOKENS].index(name) for name in names] == given
    assert ("is given id" in said) == (given != ids)
    for tokenizer in both(metadata):
        assert tokenizer.encode("a<0>b") == oracle.encode("a<0>b").ids


def test_added_tokens_that_only_other_files_have(tmp_path: Path, trained: dict[str, Any]) -> None:
    content = copy.deepcopy(trained)
    content["added_tokens"] = content["added_tokens"][
        :1
    ]  # "[PAD]" is in the vocabulary, but no longer special
    config = {
        **EOS,
        "pad_token": {"content": "[PAD]", "__type": "AddedToken"},
        "added_tokens_decoder": {
            "420": {"content": "<a>", "special": False},
            "0": {"content": "<|endoftext|>"},
        },
    }
    folder = save(tmp_path, content, tokenizer_config=config, added_tokens={"<b>": 421})
    metadata, said = convert_warned(folder, 422)
    assert "does not have 3 added tokens that the files beside it have ('[PAD]', '<a>', '<b>')" in said
    values = plain(metadata)
    assert values[keys.TOKENS][420:] == ["<a>", "<b>"]
    assert values[keys.TOKEN_TYPE][420:] == [USER_DEFINED, USER_DEFINED]
    assert values[keys.TOKEN_TYPE][:3] == [CONTROL, CONTROL, NORMAL]
    assert values[keys.PADDING_TOKEN_ID] == 1
    for tokenizer in both(metadata):
        ids = tokenizer.encode("x<a><b>[PAD]")
        assert ids[1:] == [420, 421, 1]


def test_missing_bytes_are_said(tmp_path: Path) -> None:
    oracle = tokenizers.Tokenizer(models.BPE())
    oracle.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    oracle.train_from_iterator(["abc abd " * 9], trainer)
    content = as_json(oracle)
    _, said = convert_warned(save(tmp_path, content, tokenizer_config=EOS), 300)
    assert "of the bytes that UTF-8 text is made of have no token" in said
    content["model"]["unk_token"] = "<|endoftext|>"
    _, said = convert_warned(save(tmp_path, content, tokenizer_config=EOS), 300)
    assert "bytes have no token and become '<|endoftext|>'; llama.cpp drops them" in said


def test_flags_of_added_tokens_that_llama_cpp_does_not_heed(tmp_path: Path, trained: dict[str, Any]) -> None:
    content = copy.deepcopy(trained)
    content["added_tokens"][1]["lstrip"] = True
    metadata, said = convert_warned(save(tmp_path, content, tokenizer_config=EOS))
    assert "1 added tokens ask for lstrip, rstrip or single_word ('[PAD]')" in said
    oracle = tokenizers.Tokenizer.from_str(json.dumps(content))
    assert load_tokenizer(plain(metadata)).encode("a  [PAD]") == oracle.encode("a  [PAD]").ids


# Special ids


@pytest.mark.parametrize(
    ("files", "config", "eos", "said"),
    [
        ({"tokenizer_config": EOS}, {}, 0, []),
        ({"special_tokens_map": EOS}, {}, 0, []),
        ({"special_tokens_map": {"eos_token": {"content": "[PAD]"}}}, {}, 1, []),
        ({"tokenizer_config": EOS}, {"eos_token_id": [7, 0]}, 0, []),
        ({"tokenizer_config": EOS}, {"eos_token_id": -1}, 0, []),
        ({"tokenizer_config": EOS}, {"eos_token_id": 420}, 0, ["is 420, but the vocabulary has 420"]),
        ({"tokenizer_config": EOS}, {"eos_token_id": 1}, 0, ["is 1 (the token '[PAD]'); 0 ('<|endoftext|>'"]),
        ({"generation_config": {"eos_token_id": 1}, "tokenizer_config": EOS}, {}, 0, ["in generation_"]),
        ({"generation_config": {"eos_token_id": [1]}}, {}, 1, []),
        ({}, {"eos_token_id": 1}, 1, []),
        ({}, {}, 0, []),
        ({}, {"eos_token_id": 50256}, 0, ["50256", "0 ('<|endoftext|>', by its name) is written instead"]),
        ({}, {"eos_token_id": 7}, 0, ["0 ('<|endoftext|>', by its name) is written instead"]),
        ({"tokenizer_config": {"eos_token": "</nix>"}}, {}, 0, ["is '</nix>', which is no token of"]),
        ({"tokenizer_config": {"eos_token": None}}, {}, 0, []),
    ],
)  # fmt: skip
def test_which_eos_is_written(
    tmp_path: Path,
    trained: dict[str, Any],
    files: dict[str, Any],
    config: dict[str, Any],
    eos: int,
    said: list[str],
) -> None:
    metadata, warned = convert_warned(save(tmp_path, trained, **files), **config)
    assert plain(metadata)[keys.EOS_TOKEN_ID] == eos
    assert bool(warned) == bool(said), warned
    for phrase in said:
        assert phrase in warned


def test_without_any_end_token(tmp_path: Path) -> None:
    content = as_json(train())
    content["added_tokens"] = []
    content["model"]["vocab"]["<nothing>"] = content["model"]["vocab"].pop("<|endoftext|>")
    eleven = next(token for token, token_id in content["model"]["vocab"].items() if token_id == 11)
    metadata, said = convert_warned(save(tmp_path, content), eos_token_id=50256)
    assert keys.EOS_TOKEN_ID not in plain(metadata)
    assert (
        "eos_token_id in config.json is 50256, but the vocabulary has 420 entries; no tokenizer file names"
        in said
    )
    assert f"llama.cpp will take token 11 ({eleven!r}) for one" in said
    metadata, said = convert_warned(tmp_path, eos_token_id=11)
    assert plain(metadata)[keys.EOS_TOKEN_ID] == 11
    assert f"is 11, which is the token {eleven!r} and no special token" in said


IDS = {"bos_token": "<|endoftext|>", "eos_token": "[PAD]"}


@pytest.mark.parametrize(
    ("processor", "config", "flags", "said"),
    [
        (None, IDS, (False, False), None),
        (None, {**IDS, "add_bos_token": True}, (True, False), None),
        (processors.ByteLevel(), {**IDS, "add_bos_token": False}, (False, False), None),
        (TEMPLATE, IDS, (True, True), None),
        (processors.Sequence([processors.ByteLevel(), TEMPLATE]), IDS, (True, True), None),
        (TEMPLATE, {**IDS, "add_eos_token": False}, (True, False), "add_eos_token is False, but"),
        (TEMPLATE, EOS, (True, False), "adds '[PAD]', which is not the eos_token, to each text"),
        (processors.RobertaProcessing(("[PAD]", 1), ("<|endoftext|>", 0)), IDS, (True, True), None),
    ],
)
def test_what_is_added_to_each_text(
    tmp_path: Path, processor: Any, config: dict[str, Any], flags: tuple[bool, bool], said: str | None
) -> None:
    oracle = train()
    if processor is not None:
        oracle.post_processor = processor
    metadata, warned = convert_warned(save(tmp_path, oracle, tokenizer_config=config))
    values = plain(metadata)
    assert (values[keys.ADD_BOS_TOKEN], values[keys.ADD_EOS_TOKEN]) == flags
    assert (said in warned) if said else not warned
    if said is None and processor is not None:
        for tokenizer in both(metadata):
            assert tokenizer.encode("salam") == oracle.encode("salam").ids


def test_a_flag_without_its_token(tmp_path: Path) -> None:
    content = as_json(train())
    content["added_tokens"] = content["added_tokens"][1:]
    content["model"]["vocab"]["<nothing>"] = content["model"]["vocab"].pop("<|endoftext|>")
    config = {"eos_token": "[PAD]", "add_bos_token": True}
    metadata, said = convert_warned(save(tmp_path, content, tokenizer_config=config))
    assert "add_bos_token is set, but there is no bos_token" in said
    assert plain(metadata)[keys.ADD_BOS_TOKEN] is False


# Chat templates


@pytest.mark.parametrize(
    ("in_config", "in_file", "expected"),
    [
        ("{{ a }}", None, {"": "{{ a }}"}),
        ("{{ a }}", "{{ file }}", {"": "{{ file }}"}),
        (None, "{{ file }}", {"": "{{ file }}"}),
        ("", None, {}),
        (
            [{"name": "default", "template": "d"}, {"name": "rag", "template": "r"}],
            None,
            {"": "d", ".rag": "r", "s": ["rag"]},
        ),
    ],
)
def test_chat_templates(
    tmp_path: Path, trained: dict[str, Any], in_config: Any, in_file: str | None, expected: dict[str, Any]
) -> None:
    save(tmp_path, trained, tokenizer_config={**EOS, "chat_template": in_config})
    if in_file is not None:
        (tmp_path / "chat_template.jinja").write_text(in_file)
    values = plain(convert(tmp_path))
    found = {
        key.removeprefix("tokenizer.chat_template"): value for key, value in values.items() if "chat" in key
    }
    assert found == expected
    assert load_tokenizer(values).chat_template == expected.get("")
