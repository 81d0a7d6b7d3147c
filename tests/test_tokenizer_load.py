"""GGUF metadata -> Tokenizer: ids and texts equal llama.cpp's vectors, tokenizers and sentencepiece."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_support import (
    LLAMA3,
    PROSE,
    QWEN2,
    TEXTS,
    byte_level_metadata,
    read_metadata,
    sentencepiece_metadata,
    sentencepiece_model,
    split,
    train,
)

from azquant.errors import ModelError, TokenizerError
from azquant.gguf import keys
from azquant.tokenizer import Tokenizer, load_tokenizer

SEPARATOR = "\n__ggml_vocab_test__\n"


def _sample(path: Path, size: int = 50_000) -> str:
    return path.read_text(encoding="utf-8")[:size]


def _without_json(text: str, metadata: dict[str, Any]) -> dict[str, Any]:
    return {**metadata, keys.TOKENIZER_JSON: text}


@pytest.fixture(scope="module")
def trained() -> tokenizers.Tokenizer:
    return train()


@pytest.fixture(scope="module")
def rebuilt(trained: tokenizers.Tokenizer) -> Tokenizer:
    """The tokenizer from tokenizer.ggml.* alone."""
    return load_tokenizer(byte_level_metadata(trained))


# llama.cpp's vectors


@pytest.mark.parametrize("name", ["gpt-2", "qwen2", "llama-spm"])
def test_llama_cpp_vectors(shared_data: Path, name: str) -> None:
    path = shared_data / "vocab" / f"ggml-vocab-{name}.gguf"
    tokenizer = load_tokenizer(read_metadata(path))
    texts = path.with_name(path.name + ".inp").read_bytes().decode("utf-8").split(SEPARATOR)
    lines = path.with_name(path.name + ".out").read_text().split("\n")
    assert len(texts) == len(lines) == 47
    for text, line in zip(texts, lines, strict=True):
        expected = [int(token_id) for token_id in line.split()]
        assert tokenizer.encode(text, add_special=False) == expected, text
        assert tokenizer.decode(expected) == text


# SentencePiece


@pytest.mark.parametrize("file", ["vocab/ggml-vocab-llama-spm.gguf", "stories260K/stories260K-F32.gguf"])
def test_equals_sentencepiece_on_text(shared_data: Path, file: str) -> None:
    metadata = read_metadata(shared_data / file)
    tokenizer, oracle = load_tokenizer(metadata), sentencepiece_model(metadata)
    for path in sorted((shared_data / "text").glob("*.txt")):
        text = _sample(path)
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        assert ids == oracle.encode(text), path.name
        assert tokenizer.decode(ids) == oracle.decode(ids)
    letters = [" ", "  ", "a", "aa", "-", "--", "=", "..", "\n", "\t", "e", "▁", "ə", "日", "\0"]
    dice = random.Random(1)
    for _ in range(3000):
        text = "".join(dice.choice(letters) for _ in range(dice.randint(0, 40)))
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        assert ids == oracle.encode(text), text
        assert tokenizer.decode(ids) == oracle.decode(ids)


@pytest.mark.parametrize("bytes_known", [True, False])
def test_equals_a_sentencepiece_model_trained_here(tmp_path: Path, bytes_known: bool) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text(PROSE * 3, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "m"),
        model_type="bpe",
        vocab_size=700 if bytes_known else 440,
        byte_fallback=bytes_known,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<sep>"],
        minloglevel=2,
    )
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))

    def kind(token_id: int) -> int:
        if oracle.is_unknown(token_id):
            return 2
        if oracle.is_control(token_id):
            return 3
        return 6 if oracle.is_byte(token_id) else 1

    ids = range(oracle.vocab_size())
    metadata = {
        keys.TOKENIZER_MODEL: "llama",
        keys.TOKENS: [oracle.id_to_piece(token_id) for token_id in ids],
        keys.SCORES: [oracle.get_score(token_id) for token_id in ids],
        keys.TOKEN_TYPE: [4 if oracle.id_to_piece(i) == "<sep>" else kind(i) for i in ids],
        keys.BOS_TOKEN_ID: oracle.bos_id(),
        keys.EOS_TOKEN_ID: oracle.eos_id(),
        keys.UNKNOWN_TOKEN_ID: oracle.unk_id(),
    }
    tokenizer = load_tokenizer(metadata)
    for text in (*TEXTS, *PROSE.split("\n")):
        expected = oracle.encode(text)
        assert tokenizer.encode(text, add_special=False) == expected
        assert tokenizer.encode(text) == [oracle.bos_id(), *expected]
        if bytes_known:  # sentencepiece decodes what is unknown as " ⁇ "; here it is left out
            assert tokenizer.decode([oracle.bos_id(), *expected]) == oracle.decode(expected)
    assert sum(len(piece) > 2 for piece in oracle.encode(PROSE, out_type=str)) > 50  # merges were at work
    # sentencepiece puts its prefix space before the whole text only, llama.cpp after each token found in it
    assert tokenizer.encode("<sep>", add_special=False) == [oracle.piece_to_id("<sep>")]
    if not bytes_known:
        assert oracle.encode("aŷŷŷa").count(oracle.unk_id()) == 1  # one for all that is unknown in a row
        assert tokenizer.encode("aŷŷŷa", add_special=False) == oracle.encode("aŷŷŷa")
        return
    without_types = {key: value for key, value in metadata.items() if key != keys.TOKEN_TYPE}
    assert load_tokenizer(without_types).decode(oracle.encode("ə😀")) == "ə😀"


def test_stories260k_golden_text(shared_data: Path) -> None:
    folder = shared_data / "stories260K"
    tokenizer = load_tokenizer(read_metadata(folder / "stories260K-F32.gguf"))
    ids = json.loads((folder / "greedy200_tokens.json").read_text())
    expected = (folder / "expected_stdout_llama2c.txt").read_text().rstrip("\n")
    assert tokenizer.decode(ids) == expected
    assert tokenizer.decode([tokenizer.bos_id, *ids]) == expected
    decoder = tokenizer.stream_decoder()
    assert "".join(map(decoder.push, ids)) + decoder.flush() == expected
    assert tokenizer.encode("Once upon a time") == [1, 403, 407, 261, 378]


def test_space_prefix_can_be_off() -> None:
    metadata = sentencepiece_metadata()
    with_prefix, without = (
        load_tokenizer(metadata),
        load_tokenizer({**metadata, keys.ADD_SPACE_PREFIX: False}),
    )
    a, space_a = metadata[keys.TOKENS].index("a"), metadata[keys.TOKENS].index("▁a")
    assert with_prefix.encode("a", add_special=False) == [space_a]
    assert without.encode("a", add_special=False) == [a]
    assert with_prefix.decode([space_a, space_a]) == "a a"
    assert without.decode([space_a, space_a]) == " a a"


# Byte-level BPE


@pytest.mark.parametrize(
    ("pre", "pre_tokenizer", "ignore_merges"),
    [("gpt-2", None, False), ("llama-bpe", split(LLAMA3), True), ("qwen2", split(QWEN2), False)],
)
def test_rebuilt_byte_level_equals_tokenizers(pre: str, pre_tokenizer: Any, ignore_merges: bool) -> None:
    oracle = train(pre_tokenizer, ignore_merges=ignore_merges)
    tokenizer = load_tokenizer(byte_level_metadata(oracle, pre))
    for text in TEXTS:
        expected = oracle.encode(text).ids
        assert tokenizer.encode(text, add_special=False) == expected
        assert (
            tokenizer.decode(expected, skip_special=False)
            == oracle.decode(expected, skip_special_tokens=False)
            == text
        )


def test_az_llm_exact_and_rebuilt(shared_data: Path) -> None:
    text = (shared_data / "az_llm_small" / "tokenizer.json").read_text(encoding="utf-8")
    oracle = tokenizers.Tokenizer.from_str(text)
    metadata = byte_level_metadata(oracle)
    exact, rebuilt = load_tokenizer(_without_json(text, metadata)), load_tokenizer(metadata)
    for path in sorted((shared_data / "text").glob("*.txt")):
        sample = _sample(path)
        expected = oracle.encode(sample).ids
        assert exact.encode(sample) == expected, path.name
        assert rebuilt.encode(sample) == expected, path.name
        assert exact.decode(expected, skip_special=False) == sample
        assert rebuilt.decode(expected, skip_special=False) == sample


def test_an_added_token_is_its_text_not_bytes() -> None:
    # ğ (U+011F) is also the byte-level sign for a byte; an added token must come out as written.
    oracle = train()
    oracle.add_tokens(["ğı ə"])
    content = json.loads(oracle.to_str())
    metadata = byte_level_metadata(oracle)
    metadata[keys.TOKENS].append("ğı ə")
    metadata[keys.TOKEN_TYPE] = [*metadata[keys.TOKEN_TYPE], 4]
    for tokenizer in (load_tokenizer(metadata), load_tokenizer(_without_json(json.dumps(content), metadata))):
        ids = tokenizer.encode("xğı əy")
        assert ids == oracle.encode("xğı əy").ids
        assert tokenizer.decode(ids) == "xğı əy"


def test_merges_of_a_token_with_a_leading_space_are_read_as_llama_cpp_does() -> None:
    tokens = ["a", "b", "ab", " a", " ab"]
    metadata = {keys.TOKENIZER_MODEL: "gpt2", keys.TOKENS: tokens, keys.MERGES: ["a b", " a b"]}
    assert load_tokenizer(metadata).encode("ab") == [2]


# Special tokens


def test_bos_and_eos_are_added_as_the_file_says(rebuilt: Tokenizer, trained: tokenizers.Tokenizer) -> None:
    base = rebuilt.encode("salam", add_special=False)
    assert rebuilt.encode("salam") == base
    both = load_tokenizer(
        byte_level_metadata(trained, **{keys.ADD_BOS_TOKEN: True, keys.ADD_EOS_TOKEN: True})
    )
    assert both.encode("salam") == [0, *base, 0]
    assert both.encode("salam", add_special=False) == base
    assert both.encode("") == [0, 0]
    llama3 = load_tokenizer(byte_level_metadata(trained, pre="llama-bpe"))
    assert llama3.encode("salam")[0] == 0  # llama.cpp's default for this name
    assert load_tokenizer(byte_level_metadata(trained, pre="dbrx")).encode("salam")[0] != 0


def test_parse_special(rebuilt: Tokenizer, trained: tokenizers.Tokenizer) -> None:
    exact = load_tokenizer(_without_json(trained.to_str(), byte_level_metadata(trained)))
    for tokenizer in (rebuilt, exact):
        assert tokenizer.encode("<|endoftext|>") == [0]
        as_text = tokenizer.encode("<|endoftext|>", parse_special=False)
        assert 0 not in as_text
        assert tokenizer.decode(as_text) == "<|endoftext|>"
        assert tokenizer.encode("<|endoftext|>") == [0]


def test_special_tokens_are_left_out_of_the_text(rebuilt: Tokenizer) -> None:
    ids = [0, *rebuilt.encode("bir"), 1, 0]
    assert rebuilt.decode(ids) == "bir"
    assert rebuilt.decode(ids, skip_special=False) == "<|endoftext|>bir[PAD]<|endoftext|>"
    assert rebuilt.special_ids == {0, 1}
    assert (rebuilt.bos_id, rebuilt.eos_id, rebuilt.end_ids) == (0, 0, {0})


def test_end_of_turn_ends_too(trained: tokenizers.Tokenizer) -> None:
    tokenizer = load_tokenizer(byte_level_metadata(trained, **{keys.EOT_TOKEN_ID: 1}))
    assert tokenizer.end_ids == {0, 1}


def test_chat_template_is_handed_on_raw(trained: tokenizers.Tokenizer) -> None:
    assert load_tokenizer(byte_level_metadata(trained)).chat_template is None
    template = "{{ ''.__class__.__mro__ }}"
    assert (
        load_tokenizer(byte_level_metadata(trained, **{keys.CHAT_TEMPLATE: template})).chat_template
        == template
    )


# Streaming


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_stream_pieces_join_to_decode(rebuilt: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, rebuilt.n_vocab - 1), max_size=60))
    cut = data.draw(st.integers(0, len(ids)))
    skip = data.draw(st.booleans())
    decoder = rebuilt.stream_decoder(skip_special=skip)
    pieces = [decoder.push(token_id) for token_id in ids] + [decoder.flush()]
    assert "".join(pieces) == rebuilt.decode(ids, skip_special=skip)
    joined = b"".join(rebuilt.piece(token_id, skip) for token_id in ids)
    assert "".join(pieces) == joined.decode("utf-8", "replace")
    later = rebuilt.stream_decoder(skip_special=skip, after=ids[:cut])
    assert "".join(pieces).endswith("".join(map(later.push, ids[cut:])) + later.flush())


def test_a_character_spread_over_tokens_comes_whole(rebuilt: Tokenizer) -> None:
    ids = rebuilt.encode("👩")
    assert len(ids) > 2
    decoder = rebuilt.stream_decoder()
    assert [decoder.push(token_id) for token_id in ids] == [*[""] * (len(ids) - 1), "👩"]
    assert decoder.flush() == ""


def test_a_character_never_finished_is_a_replacement(rebuilt: Tokenizer) -> None:
    start, *_ = rebuilt.encode("👩")
    decoder = rebuilt.stream_decoder()
    assert (decoder.push(start), decoder.flush()) == ("", "\ufffd")
    (a,) = rebuilt.encode("a")
    decoder = rebuilt.stream_decoder()
    assert (decoder.push(start), decoder.push(a), decoder.flush()) == ("", "\ufffda", "")


def test_a_prompt_comes_before_the_stream(rebuilt: Tokenizer) -> None:
    first, *rest = rebuilt.encode("👩")
    decoder = rebuilt.stream_decoder(after=[first])
    assert "".join(map(decoder.push, rest)) == "👩"
    spm = load_tokenizer(sentencepiece_metadata())
    space_a = spm.encode("a", add_special=False)[0]
    assert spm.stream_decoder().push(space_a) == "a"
    assert spm.stream_decoder(after=[space_a]).push(space_a) == " a"


@pytest.mark.parametrize(
    "decoder", [None, tokenizers.decoders.BPEDecoder("</w>"), tokenizers.decoders.WordPiece()]
)
def test_a_decoder_only_tokenizers_has(decoder: Any) -> None:
    """The course's tokenizer (BPE, Whitespace, no decoder) and its like: by the carried tokenizer.json."""
    suffix = {"end_of_word_suffix": "</w>"} if isinstance(decoder, tokenizers.decoders.BPEDecoder) else {}
    oracle = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]", **suffix))
    oracle.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[EOS]"], show_progress=False, **suffix
    )
    oracle.train_from_iterator([PROSE], trainer)
    if decoder is not None:
        oracle.decoder = decoder
    tokens = [oracle.id_to_token(token_id) for token_id in range(oracle.get_vocab_size())]
    tokenizer = load_tokenizer(
        {keys.TOKENIZER_MODEL: "no_vocab", keys.TOKENS: tokens, keys.TOKENIZER_JSON: oracle.to_str()}
    )
    ids = tokenizer.encode(PROSE)
    assert ids == oracle.encode(PROSE).ids
    expected = oracle.decode(ids)
    assert tokenizer.decode(ids) == expected
    stream = tokenizer.stream_decoder()
    assert "".join(map(stream.push, ids)) + stream.flush() == expected
    stream = tokenizer.stream_decoder(after=ids[:9])
    assert (
        oracle.decode(ids[:9]) + "".join(map(stream.push, ids[9:])) + stream.flush()
    ).split() == expected.split()


# The carried tokenizer.json


def test_truncation_padding_and_dropout_do_not_touch_prompts(trained: tokenizers.Tokenizer) -> None:
    content = json.loads(trained.to_str())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 900},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    content["model"]["dropout"] = 0.9
    tokenizer = load_tokenizer(_without_json(json.dumps(content), byte_level_metadata(trained)))
    assert tokenizer.encode(PROSE) == trained.encode(PROSE).ids


def test_carried_json_of_another_tokenizer(trained: tokenizers.Tokenizer) -> None:
    metadata = byte_level_metadata(train(vocab_size=300))
    with pytest.raises(ModelError, match=r"420 tokens.*only 300"):
        load_tokenizer(_without_json(trained.to_str(), metadata)).encode("a")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model": 1}', "[" * 100_000, '{"version": "9"}'])
def test_broken_carried_json(trained: tokenizers.Tokenizer, text: str) -> None:
    tokenizer = load_tokenizer(_without_json(text, byte_level_metadata(trained)))
    with pytest.raises(TokenizerError, match=r"tokenizer\.huggingface\.json"):
        tokenizer.encode("a")


# Files without a usable tokenizer


def test_no_vocab_raises_on_text_only() -> None:
    tokenizer = load_tokenizer(
        {
            keys.TOKENIZER_MODEL: "no_vocab",
            keys.ARCHITECTURE: "gpt2",
            "gpt2.vocab_size": 96,
            keys.EOS_TOKEN_ID: 5,
        }
    )
    assert (tokenizer.n_vocab, tokenizer.eos_id, tokenizer.bos_id) == (96, 5, None)
    for use in (lambda: tokenizer.encode("a"), lambda: tokenizer.decode([1]), lambda: tokenizer.piece(1)):
        with pytest.raises(TokenizerError, match="no tokenizer; give token ids"):
            use()
    assert load_tokenizer({}).n_vocab == 0


def test_a_kind_that_azquant_does_not_run() -> None:
    tokenizer = load_tokenizer({keys.TOKENIZER_MODEL: "rwkv", keys.TOKENS: ["a"]})
    with pytest.raises(TokenizerError, match="'rwkv'"):
        tokenizer.encode("a")


def test_an_unknown_pre_tokenizer_still_decodes(trained: tokenizers.Tokenizer) -> None:
    tokenizer = load_tokenizer(byte_level_metadata(trained, pre="of-tomorrow"))
    assert tokenizer.decode(trained.encode("salam").ids) == "salam"
    with pytest.raises(TokenizerError, match="'of-tomorrow'"):
        tokenizer.encode("salam")


# Manners


def test_neither_imports_nor_needs_tokenizers_to_decode() -> None:
    program = (
        "import sys, azquant.tokenizer as t\n"
        "assert 'tokenizers' not in sys.modules and 'torch' not in sys.modules\n"
        "sys.modules['tokenizers'] = None\n"
        "k = t.load_tokenizer({'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.tokens': ['a', 'Ġb']})\n"
        "assert k.decode([0, 1]) == 'a b'\n"
        "try:\n    k.encode('a')\n"
        "except ImportError as error:\n    assert 'azquant[text]' in str(error)\n"
        "else:\n    raise SystemExit('encoded without tokenizers')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_several_threads_at_once(trained: tokenizers.Tokenizer) -> None:
    tokenizer = load_tokenizer(byte_level_metadata(trained))
    expected = {flag: trained.encode(PROSE).ids for flag in (True, False)}
    with ThreadPoolExecutor(8) as pool:
        results = list(
            pool.map(lambda i: (i % 2 == 0, tokenizer.encode(PROSE, parse_special=i % 2 == 0)), range(64))
        )
    assert all(ids == expected[flag] for flag, ids in results)
