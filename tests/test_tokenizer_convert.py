"""Hugging Face tokenizer folder -> GGUF metadata, judged by llama.cpp, tokenizers, transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizer_support import (
    CL100K,
    CONTROL,
    EOS,
    GPT2,
    LLAMA3,
    NORMAL,
    PROSE,
    QWEN2,
    TEXTS,
    USER_DEFINED,
    LlamaCpp,
    as_json,
    both,
    convert,
    convert_warned,
    plain,
    save,
    split,
    train,
)
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from azquant.conversion.tokenizer import tokenizer_metadata
from azquant.errors import TokenizerError
from azquant.gguf import keys
from azquant.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def llama_cpp() -> Iterator[LlamaCpp]:
    llama = LlamaCpp()
    yield llama
    llama.close()


# The main job


def test_az_llm_small(shared_data: Path) -> None:
    folder = shared_data / "az_llm_small"
    config = json.loads((folder / "config.json").read_text())
    metadata = plain(convert(folder, 4096, **config))
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    content = json.loads(text)
    assert metadata.pop(keys.TOKENIZER_JSON) == text
    assert {token: i for i, token in enumerate(metadata.pop(keys.TOKENS))} == content["model"]["vocab"]
    assert metadata.pop(keys.TOKEN_TYPE) == [CONTROL] * 3 + [NORMAL] * 4093
    assert metadata.pop(keys.MERGES) == [" ".join(pair) for pair in content["model"]["merges"]]
    assert metadata == {
        keys.TOKENIZER_MODEL: "gpt2",
        keys.TOKENIZER_PRE: "gpt-2",
        keys.BOS_TOKEN_ID: 0,
        keys.EOS_TOKEN_ID: 0,
        keys.UNKNOWN_TOKEN_ID: 1,
        keys.PADDING_TOKEN_ID: 2,
        keys.ADD_BOS_TOKEN: False,
        keys.ADD_EOS_TOKEN: False,
    }


def test_az_llm_small_in_llama_cpp(shared_data: Path, tmp_path: Path, llama_cpp: LlamaCpp) -> None:
    folder = shared_data / "az_llm_small"
    metadata = convert(folder, 4096)
    exact, rebuilt = both(metadata)
    oracle = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    paths = sorted((shared_data / "text").glob("*.txt"))
    samples = [path.read_text(encoding="utf-8")[:50_000] for path in paths]
    of_llama = llama_cpp.encode(tmp_path / "a.gguf", metadata, samples)
    for path, sample, ids in zip(paths, samples, of_llama, strict=True):
        expected = oracle.encode(sample).ids
        assert exact.encode(sample) == expected, path.name
        assert rebuilt.encode(sample) == expected, path.name
        assert ids == expected, path.name


def test_what_transformers_saves(tmp_path: Path) -> None:
    """Its GPT2Config says bos = eos = 50256 for any vocabulary; its tokenizer says otherwise and counts."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=421, bos_token_id=50256, eos_token_id=50256)
    config.save_pretrained(tmp_path)
    transformers.GenerationConfig.from_model_config(config).save_pretrained(tmp_path)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=train(), **EOS, pad_token="[PAD]")
    fast.add_tokens(["<user>"])
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    metadata, said = convert_warned(tmp_path, 421, **saved)
    for kind in ("bos", "eos"):
        assert (
            f"{kind}_token_id in config.json and generation_config.json is 50256, but the vocabulary has 421"
            in said
        )
    assert said.count("0 ('<|endoftext|>', by tokenizer_config.json) is written instead") == 2
    values = plain(metadata)
    assert (values[keys.BOS_TOKEN_ID], values[keys.EOS_TOKEN_ID], values[keys.PADDING_TOKEN_ID]) == (0, 0, 1)
    assert values[keys.TOKENS][420] == "<user>"
    assert values[keys.TOKEN_TYPE][420] == USER_DEFINED
    assert values[keys.CHAT_TEMPLATE] == "{{ messages }}"
    for tokenizer in both(metadata):
        for text in (*TEXTS, "a<user>b <user>", "[PAD]x"):
            assert tokenizer.encode(text) == fast.encode(text)


# Pre-tokenizers

BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
MATCHING = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "gpt-2 split": split(GPT2),
    "gpt-2 short": split(GPT2.removesuffix(r"|\s+")),
    "dbrx": split(LLAMA3),
    "dbrx cl100k": split(CL100K, "removed", invert=True),
    "qwen2": split(QWEN2),
    "qwen2 braces": split(QWEN2.replace(r"\p{N}|", r"\p{N}{1}|")),
    "ufakzeka": split(QWEN2.partition("|[^")[2].join(("[^", ""))),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]),
    "smollm nested": pre_tokenizers.Sequence(
        [pre_tokenizers.Sequence([pre_tokenizers.Digits(True)]), pre_tokenizers.ByteLevel(False)]
    ),
}


@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("case", MATCHING)
def test_a_known_split_matches_exactly(
    tmp_path: Path, llama_cpp: LlamaCpp, case: str, ignore_merges: bool
) -> None:
    oracle = train(MATCHING[case], ignore_merges=ignore_merges)
    metadata = convert(save(tmp_path, oracle, tokenizer_config=EOS))
    name = plain(metadata)[keys.TOKENIZER_PRE]
    assert name == ("llama-bpe" if case.startswith("dbrx") and ignore_merges else case.split()[0])
    exact, rebuilt = both(metadata)
    of_llama = llama_cpp.encode(tmp_path / "a.gguf", metadata, TEXTS)
    for text, ids in zip(TEXTS, of_llama, strict=True):
        assert exact.encode(text) == rebuilt.encode(text) == ids == oracle.encode(text).ids


def test_ignore_merges_chooses_between_names_of_one_split(tmp_path: Path, llama_cpp: LlamaCpp) -> None:
    """A token that its own merges do not lead to is found by one name and not by the other."""
    content = as_json(train(split(LLAMA3)))
    content["model"]["vocab"]["qqz"] = 420
    content["model"]["vocab"]["qz"] = 421
    content["model"]["vocab"]["qq"] = 422
    content["model"]["merges"] += [["q", "z"], ["q", "q"], ["qq", "z"]]
    for ignore_merges, name in ((False, "dbrx"), (True, "llama-bpe")):
        content["model"]["ignore_merges"] = ignore_merges
        metadata = convert(save(tmp_path, content, tokenizer_config=EOS), 423)
        assert plain(metadata)[keys.TOKENIZER_PRE] == name
        exact, rebuilt = both(metadata)
        ids = exact.encode("qqz")
        assert (ids == [420]) == ignore_merges
        assert rebuilt.encode("qqz") == ids
        assert llama_cpp.encode(tmp_path / f"{name}.gguf", metadata, ["qqz"]) == [ids]
    # The GPT-2 split has no name that ignores merges: that is said.
    content["pre_tokenizer"] = as_json(train())["pre_tokenizer"]
    _, said = convert_warned(save(tmp_path, content, tokenizer_config=EOS), 423)
    assert "ignore_merges=True, the name 'gpt-2' means the opposite" in said


@pytest.mark.parametrize(
    ("pre_tokenizer", "name", "said", "seen"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=True), "gpt-2", "puts a space before the text", True),
        (BYTE_LEVEL, "gpt-2", "does not split the text at all", True),
        (split(r"\w+|\s"), "gpt-2", r"its split is '\\w+|\\s'", True),
        (split(LLAMA3 + "|x"), "dbrx", "its split is", False),
        (split(QWEN2, "merged_with_next"), "qwen2", "behavior='MergedWithNext', invert=False", False),
        (
            pre_tokenizers.Sequence([pre_tokenizers.Split(LLAMA3, "isolated"), BYTE_LEVEL]),
            "gpt-2",
            "must be given as tokenizers.Regex",
            True,
        ),
        (
            pre_tokenizers.Sequence([pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(False)]),
            "gpt-2",
            r"its split is '\\p{N}+' then",
            False,
        ),
        (
            pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(False)]),
            "gpt-2",
            "it has a Punctuation step",
            True,
        ),
    ],
)
def test_another_split_is_said_to_differ(
    tmp_path: Path, llama_cpp: LlamaCpp, pre_tokenizer: Any, name: str, said: str, seen: bool
) -> None:
    """``seen``: the difference shows in TEXTS."""
    oracle = train(pre_tokenizer)
    metadata, warned = convert_warned(save(tmp_path, oracle, tokenizer_config=EOS))
    assert "llama.cpp will not tokenize exactly" in warned
    assert said in warned
    assert f"{name!r}, is written" in warned
    assert plain(metadata)[keys.TOKENIZER_PRE] == name
    exact, rebuilt = both(metadata)
    expected = [oracle.encode(text).ids for text in TEXTS]
    assert [exact.encode(text) for text in TEXTS] == expected
    of_llama = llama_cpp.encode(tmp_path / "a.gguf", metadata, TEXTS)
    assert [rebuilt.encode(text) for text in TEXTS] == of_llama
    assert (of_llama != expected) == seen


def test_a_split_that_drops_its_matches(tmp_path: Path) -> None:
    content = as_json(train(split(QWEN2)))
    content["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Removed"
    metadata, said = convert_warned(save(tmp_path, content, tokenizer_config=EOS))
    assert "it has a Split with behavior='Removed', invert=False" in said
    exact, rebuilt = both(metadata)
    assert exact.encode("salam") == []
    assert rebuilt.encode("salam") != []


@pytest.mark.parametrize("normalizer", [normalizers.NFC(), normalizers.Lowercase()])
def test_a_normalizer_is_said_to_be_lost(tmp_path: Path, normalizer: Any) -> None:
    oracle = train()
    oracle.normalizer = normalizers.Sequence([normalizer])
    metadata, warned = convert_warned(save(tmp_path, oracle, tokenizer_config=EOS))
    assert f"normalizes text first ({type(normalizer).__name__})" in warned
    assert load_tokenizer(plain(metadata)).encode(PROSE) == oracle.encode(PROSE).ids


# Tokenizers that llama.cpp cannot run


def _foreign(
    model: Any, trainer: Any, pre_tokenizer: Any = None, decoder: Any = None
) -> tokenizers.Tokenizer:
    oracle = tokenizers.Tokenizer(model)
    oracle.pre_tokenizer = pre_tokenizer or pre_tokenizers.Whitespace()
    if decoder is not None:
        oracle.decoder = decoder
    oracle.train_from_iterator([PROSE] * 3, trainer)
    return oracle


COMMON = {"vocab_size": 300, "special_tokens": ["[UNK]", "[EOS]"], "show_progress": False}
FOREIGN = {
    "course": (
        lambda: _foreign(models.BPE(unk_token="[UNK]"), trainers.BpeTrainer(**COMMON)),
        "its pre-tokenizer is pre_tokenizers.Whitespace, which throws the spaces away,",
    ),
    "wordpiece": (
        lambda: _foreign(
            models.WordPiece(unk_token="[UNK]"),
            trainers.WordPieceTrainer(**COMMON),
            decoder=decoders.WordPiece(),
        ),
        "its model is WordPiece",
    ),
    "unigram without an unknown token": (
        lambda: _foreign(
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=300, show_progress=False),
            pre_tokenizers.Metaspace(),
            decoders.Metaspace(),
        ),
        "its Unigram model has no unknown token",
    ),
    "unigram without metaspace": (
        lambda: _foreign(models.Unigram(), trainers.UnigramTrainer(**COMMON, unk_token="[UNK]")),
        "does not write spaces as U+2581",
    ),
    "metaspace bpe without bytes": (
        lambda: _foreign(
            models.BPE(unk_token="[UNK]"),
            trainers.BpeTrainer(**COMMON),
            pre_tokenizers.Metaspace(),
            decoders.Metaspace(),
        ),
        "a SentencePiece-style BPE without byte_fallback",
    ),
    "word level": (
        lambda: _foreign(models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer(**COMMON)),
        "its model is WordLevel",
    ),
    "suffix": (
        lambda: _foreign(
            models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"),
            trainers.BpeTrainer(**COMMON, end_of_word_suffix="</w>"),
            pre_tokenizers.ByteLevel(),
            decoders.BPEDecoder("</w>"),
        ),
        "end_of_word_suffix='</w>'",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_llama_cpp_cannot_run_azquant_still_does(tmp_path: Path, llama_cpp: LlamaCpp, case: str) -> None:
    make, why = FOREIGN[case]
    oracle = make()
    size = oracle.get_vocab_size()
    metadata, said = convert_warned(save(tmp_path, oracle), size + 2)
    assert "llama.cpp cannot tokenize for this model" in said
    assert why in said
    assert "tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)" in said
    values = plain(metadata)
    assert values[keys.TOKENIZER_MODEL] == "no_vocab"
    assert keys.MERGES not in values
    assert len(values[keys.TOKENS]) == size + 2
    tokenizer = load_tokenizer(values)
    texts = [PROSE] if "unknown" in case else TEXTS  # without an unknown token other text is an error
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == oracle.encode(text).ids
        assert tokenizer.decode(ids) == oracle.decode(ids)
    with pytest.raises(TokenizerError, match=r"llama\.cpp cannot tokenize"):
        tokenizer_metadata(tmp_path, size + 2, {}, strict=True)
    if case == "course":
        assert tokenizer.eos_id == 1
        assert llama_cpp.encode(tmp_path / "a.gguf", metadata, []) == []  # it loads, to run on ids


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    metadata, said = convert_warned(tmp_path)
    assert plain(metadata) == {keys.TOKENIZER_MODEL: "no_vocab"}
    assert "has no tokenizer.json" in said
    (tmp_path / "az_llm-tokenizer.json").write_text("{}")
    assert "If az_llm-tokenizer.json is it, give it: tokenizer=" in convert_warned(tmp_path)[1]


def test_vocab_and_merges_files(tmp_path: Path) -> None:
    """The layout of the original GPT-2: no tokenizer.json."""
    oracle = train()
    oracle.model.save(str(tmp_path))
    metadata = convert(tmp_path)
    assert plain(metadata)[keys.TOKEN_TYPE][:3] == [CONTROL, NORMAL, NORMAL]
    assert plain(metadata)[keys.EOS_TOKEN_ID] == 0
    for tokenizer in both(metadata):
        for text in TEXTS:
            assert tokenizer.encode(text) == oracle.encode(text).ids


# Manners


def test_conversion_does_not_need_tokenizers(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['tokenizers'] = None; sys.modules['transformers'] = None\n"
        "from pathlib import Path\n"
        "from azquant.conversion.tokenizer import tokenizer_metadata\n"
        f"tokenizer_metadata(Path({str(save(tmp_path, train()))!r}), 420, {{}})\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)


def test_regex_as_text_never_matches() -> None:
    """Why a Split at plain text is warned of: tokenizers takes it literally."""
    literal = pre_tokenizers.Split(LLAMA3, "isolated")
    assert len(literal.pre_tokenize_str(PROSE)) == 1
    assert len(pre_tokenizers.Split(Regex(LLAMA3), "isolated").pre_tokenize_str(PROSE)) > 50
