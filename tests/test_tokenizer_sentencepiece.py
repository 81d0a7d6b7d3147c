"""tokenizer.model files and SentencePiece-style tokenizer.json, judged by sentencepiece and llama.cpp."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizer_support import PROSE, TEXTS, LlamaCpp, convert_warned, plain, save
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from azquant._charsmap import Charsmap
from azquant.conversion._sentencepiece import read_sentencepiece
from azquant.conversion.agreement import Agreement
from azquant.conversion.sample import SAMPLE
from azquant.conversion.tokenizer import tokenizer_proof
from azquant.errors import ConversionWarning, TokenizerError
from azquant.gguf import keys
from azquant.tokenizer import load_tokenizer

sentencepiece = pytest.importorskip("sentencepiece")

SIZE = 600
# Special tokens' texts stand for the tokens here, and for themselves in sentencepiece. A text of spaces alone
# is one space less in llama.cpp's Unigram.
ALL = [text for text in (*SAMPLE, *TEXTS) if "<|" not in text and text.strip(" ")]
IDENTITY = {"normalization_rule_name": "identity"}
KEEP = {"remove_extra_whitespaces": False}


@pytest.fixture(scope="module")
def llama_cpp() -> Iterator[LlamaCpp]:
    llama = LlamaCpp()
    yield llama
    llama.close()


def train(folder: Path, kind: str, **options: Any) -> Any:
    folder.mkdir(exist_ok=True)
    text = folder / "text.txt"
    text.write_text("\n".join((PROSE, *SAMPLE[:8])) * 3, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), model_type=kind, vocab_size=SIZE,
        minloglevel=2, hard_vocab_limit=False, **options
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def prove(path: Path, size: int = SIZE, **options: Any) -> tuple[dict[str, Any], Agreement | None, str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metadata, agreement = tokenizer_proof(path, size, {}, **options)
    assert all(issubclass(item.category, ConversionWarning) for item in caught)
    return metadata, agreement, "\n".join(str(item.message) for item in caught)


EXACT_MODELS = {
    "bpe as Llama 2's": ("bpe", {"byte_fallback": True, **IDENTITY, **KEEP}),
    "bpe without a prefix": ("bpe", {"byte_fallback": True, "add_dummy_prefix": False, **IDENTITY, **KEEP}),
    "unigram": ("unigram", IDENTITY),
    "unigram as it comes": ("unigram", {}),
    "unigram that folds case": ("unigram", {"normalization_rule_name": "nmt_nfkc_cf"}),
    "unigram that keeps spaces": ("unigram", {**IDENTITY, **KEEP}),
}


@pytest.mark.parametrize("case", EXACT_MODELS)
def test_a_model_that_llama_cpp_runs_exactly(tmp_path: Path, llama_cpp: LlamaCpp, case: str) -> None:
    kind, options = EXACT_MODELS[case]
    oracle = train(tmp_path, kind, **options)
    metadata, agreement, said = prove(tmp_path, SIZE + 4, strict=True)
    values = plain(metadata)
    assert said == ""
    assert agreement is not None
    assert agreement.wrong_tokens == 0
    assert values[keys.TOKENIZER_MODEL] == ("llama" if kind == "bpe" else "t5")
    assert (values[keys.BOS_TOKEN_ID], values[keys.EOS_TOKEN_ID], values[keys.UNKNOWN_TOKEN_ID]) == (1, 2, 0)
    assert values[keys.ADD_BOS_TOKEN] is False
    assert values[keys.TOKEN_TYPE][:4] == [2, 3, 3, 6 if "byte_fallback" in options else 1]
    assert values[keys.TOKEN_TYPE][-4:] == [5] * 4
    expected = [oracle.encode(text) for text in ALL]
    exact, rebuilt = load_tokenizer(values), load_tokenizer(plain(metadata, keys.TOKENIZER_JSON))
    assert [exact.encode(text) for text in ALL] == expected
    assert [rebuilt.encode(text) for text in ALL] == expected
    assert llama_cpp.encode(tmp_path / "a.gguf", metadata, ALL) == expected
    for text, ids in zip(SAMPLE, expected, strict=False):
        if kind == "bpe" or oracle.unk_id() not in ids:
            assert exact.decode(ids) == rebuilt.decode(ids) == oracle.decode(ids), text


FLAGGED_MODELS = {
    "bpe that normalizes": ("bpe", {"byte_fallback": True}, "normalizes characters first (Precompiled)"),
    "bpe that merges spaces": ("bpe", {"byte_fallback": True, **IDENTITY}, "drops superfluous spaces"),
    "unigram with bytes": ("unigram", {"byte_fallback": True, **IDENTITY}, "falls back to bytes"),
}


@pytest.mark.parametrize("case", FLAGGED_MODELS)
def test_a_model_that_llama_cpp_runs_nearly(tmp_path: Path, llama_cpp: LlamaCpp, case: str) -> None:
    kind, options, why = FLAGGED_MODELS[case]
    oracle = train(tmp_path, kind, **options)
    metadata, agreement, said = prove(tmp_path)
    assert why in said
    assert agreement is not None
    assert str(agreement) in said
    found = llama_cpp.encode(tmp_path / "a.gguf", metadata, SAMPLE)
    exact = load_tokenizer(plain(metadata))
    assert agreement.wrong_texts == sum(
        exact.encode(text) != ids for text, ids in zip(SAMPLE, found, strict=True)
    )
    assert agreement.wrong_texts > 0
    assert [exact.encode(text) for text in ALL] == [oracle.encode(text) for text in ALL]
    with pytest.raises(TokenizerError, match=r"\(strict\)"):
        prove(tmp_path, strict=True)


def test_a_bpe_without_bytes_runs_in_azquant_alone(tmp_path: Path) -> None:
    oracle = train(tmp_path, "bpe", **IDENTITY)
    metadata, agreement, said = prove(tmp_path)
    assert "a SentencePiece-style BPE without byte_fallback" in said
    assert agreement is None
    assert plain(metadata)[keys.TOKENIZER_MODEL] == "no_vocab"
    exact = load_tokenizer(plain(metadata))
    assert [exact.encode(text) for text in ALL] == [oracle.encode(text) for text in ALL]


def test_user_defined_symbols(tmp_path: Path, llama_cpp: LlamaCpp) -> None:
    train(tmp_path, "unigram", user_defined_symbols=["<user>", "<bot>"], **IDENTITY)
    metadata, _, _ = prove(tmp_path)
    values = plain(metadata)
    assert values[keys.TOKEN_TYPE][3:5] == [4, 4]
    texts = ["<user>salam<bot>", "a <user> b"]
    exact = load_tokenizer(values)
    assert llama_cpp.encode(tmp_path / "a.gguf", metadata, texts) == [exact.encode(text) for text in texts]
    assert 3 in exact.encode(texts[0])


def test_a_file_of_another_name_and_its_bos(tmp_path: Path) -> None:
    train(tmp_path, "bpe", byte_fallback=True, **IDENTITY, **KEEP)
    (tmp_path / "tokenizer.model").rename(tmp_path / "az.model")
    assert plain(prove(tmp_path / "az.model")[0])[keys.TOKENIZER_MODEL] == "llama"
    (tmp_path / "az.model").rename(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    assert plain(prove(tmp_path)[0])[keys.ADD_BOS_TOKEN] is True


@pytest.mark.parametrize("kind", ["word", "char"])
def test_word_and_character_models_are_refused(tmp_path: Path, kind: str) -> None:
    train(tmp_path, kind)
    with pytest.raises(TokenizerError, match=rf"type {kind.title()}; BPE and Unigram are supported"):
        prove(tmp_path)


def test_spaces_as_suffixes_are_refused(tmp_path: Path) -> None:
    train(tmp_path, "unigram", treat_whitespace_as_suffix=True)
    with pytest.raises(TokenizerError, match="treat_whitespace_as_suffix"):
        prove(tmp_path)


def test_every_prefix_of_a_model_is_refused_or_a_model(tmp_path: Path) -> None:
    train(tmp_path, "unigram")
    data = (tmp_path / "tokenizer.model").read_bytes()
    whole = len(read_sentencepiece(data, "m").pieces)
    for stop in [*range(120), *range(len(data) - 300, len(data)), *range(0, len(data), 997)]:
        try:
            assert len(read_sentencepiece(data[:stop], "m").pieces) <= whole
        except TokenizerError as error:
            assert str(error).startswith("m")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"IQ== 0\nIg== 1\n",  # tiktoken's
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x0b" * 50,
        b"\xff" * 50,
        b"\x0a\x02\x0a\x00",
        b"\x0a\x04\x0a\x02\xc3\x28",
        b"\x0a\x08\x0a\x01a\x15\x00\x00\xc0\x7f",
        b"\x0a\x05\x0a\x01a\x18\x09",
        b"\x0a\x03\x0a\x01a" * 2,
        b"\x0a\x03\x0a\x01a\x12\x02\x18\x09",
        b"\x08\x01",
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        prove(tmp_path)


def test_a_damaged_charsmap_is_refused(tmp_path: Path) -> None:
    train(tmp_path, "unigram")
    model = read_sentencepiece((tmp_path / "tokenizer.model").read_bytes(), "m")
    whole = model.charsmap
    for data in (b"", b"abc", whole[:5000], b"\x08\0\0\0" + b"\xff" * 8, whole[:4] + b"\xff" * 4000):
        try:
            assert isinstance(Charsmap(data).apply("salam e\u0301 Ə"), str)
        except TokenizerError as error:
            assert "charsmap" in str(error)
    assert Charsmap(whole).apply("e\u0301 ①\r\n") == "é 1  "


# tokenizer.json in SentencePiece's style


def _llama2_style(normalizer: Any, pre_tokenizer: Any, sample: str = PROSE) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=special, show_progress=False, limit_alphabet=80
    )
    tokenizer.train_from_iterator([*sample.splitlines(keepends=True), *SAMPLE[:6]], trainer)
    content = tokenizer.to_str()
    import json

    plain_json = json.loads(content)
    plain_json["added_tokens"] = plain_json["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(plain_json))


STYLES = {
    "Llama 2": (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, True),
    "Gemma": (normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), False),
    "Metaspace": (None, pre_tokenizers.Metaspace(prepend_scheme="always"), True),
    "Metaspace never": (None, pre_tokenizers.Metaspace(prepend_scheme="never"), False),
}


@pytest.mark.parametrize("style", STYLES)
def test_json_bpe_with_bytes(tmp_path: Path, llama_cpp: LlamaCpp, style: str) -> None:
    """Scores made from merges give llama.cpp the same tokens, or the difference is counted."""
    normalizer, pre_tokenizer, prefix = STYLES[style]
    oracle = _llama2_style(normalizer, pre_tokenizer)
    eos = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    metadata, agreement, said = prove(save(tmp_path, oracle, tokenizer_config=eos), oracle.get_vocab_size())
    values = plain(metadata)
    assert values[keys.TOKENIZER_MODEL] == "llama"
    assert values[keys.ADD_SPACE_PREFIX] is prefix
    assert values[keys.TOKEN_TYPE][:4] == [2, 3, 3, 6]
    expected = [oracle.encode(text).ids for text in SAMPLE]
    exact = load_tokenizer(values)
    assert [exact.encode(text) for text in SAMPLE] == expected
    found = llama_cpp.encode(tmp_path / "a.gguf", metadata, SAMPLE)
    assert agreement is not None
    assert agreement.wrong_texts == sum(a != b for a, b in zip(expected, found, strict=True))
    assert (agreement.wrong_texts > 0) == ("will not tokenize exactly" in said)
    assert agreement.rate < 0.2


def test_json_unigram(tmp_path: Path, llama_cpp: LlamaCpp) -> None:
    oracle = Tokenizer(models.Unigram())
    oracle.pre_tokenizer, oracle.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    oracle.train_from_iterator([PROSE] * 3, trainer)
    metadata, agreement, _ = prove(save(tmp_path, oracle, tokenizer_config={"eos_token": "</s>"}), 300)
    assert plain(metadata)[keys.TOKENIZER_MODEL] == "t5"
    expected = [oracle.encode(text).ids for text in SAMPLE]
    exact = load_tokenizer(plain(metadata))
    assert [exact.encode(text) for text in SAMPLE] == expected
    assert [exact.decode(ids) for ids in expected] == [oracle.decode(ids) for ids in expected]
    found = llama_cpp.encode(tmp_path / "a.gguf", metadata, SAMPLE)
    assert agreement is not None
    assert agreement.wrong_texts == sum(a != b for a, b in zip(expected, found, strict=True)) <= 2


def test_a_step_that_llama_cpp_lacks_is_named(tmp_path: Path) -> None:
    oracle = Tokenizer(models.Unigram())
    oracle.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    oracle.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    oracle.train_from_iterator([PROSE] * 3, trainer)
    _, said = convert_warned(save(tmp_path, oracle, tokenizer_config={"eos_token": "</s>"}), 300)
    assert "it normalizes text first (NFKC), which llama.cpp does not" in said
    assert "Measured: " in said
