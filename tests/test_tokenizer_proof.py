"""How far llama.cpp's tokens are from a tokenizer's: what conversion says, against llama.cpp itself."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tokenizer_support import (
    CL100K,
    EOS,
    GPT2,
    LLAMA3,
    PROSE,
    QWEN2,
    LlamaCpp,
    as_json,
    convert_warned,
    plain,
    save,
    split,
    train,
)
from tokenizers import normalizers, pre_tokenizers

from azquant.conversion.agreement import Agreement, corpus_texts
from azquant.conversion.sample import SAMPLE
from azquant.conversion.tokenizer import tokenizer_metadata, tokenizer_proof
from azquant.errors import ConversionWarning, InputFileError, TokenizerError
from azquant.gguf import keys
from azquant.tokenizer import load_tokenizer

PRE = {
    **{
        f"ByteLevel {regex=} {prefix=}": (lambda regex=regex, prefix=prefix: pre_tokenizers.ByteLevel(
            add_prefix_space=prefix, use_regex=regex
        ))
        for regex, prefix in product((True, False), repeat=2)
    },
    "GPT-2": lambda: split(GPT2),
    "Llama 3": lambda: split(LLAMA3),
    "Qwen2": lambda: split(QWEN2),
    "cl100k": lambda: split(CL100K, "removed", invert=True),
    "single digits": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]
    ),
    "digits": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(False)]
    ),
}  # fmt: skip
NORMALIZERS = {"": None, "NFC": normalizers.NFC, "NFKC": normalizers.NFKC, "Lowercase": normalizers.Lowercase}
EXACT = {"ByteLevel regex=True prefix=False", "GPT-2", "Llama 3", "Qwen2", "cl100k", "single digits"}


@pytest.fixture(scope="module")
def llama_cpp() -> Iterator[LlamaCpp]:
    llama = LlamaCpp()
    yield llama
    llama.close()


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """The sample, and the beginning of each shared text where they are here."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "text"
    return [*SAMPLE, *(path.read_text(encoding="utf-8")[:20_000] for path in sorted(folder.glob("*.txt")))]


def prove(folder: Path, **options: Any) -> tuple[dict[str, Any], Agreement | None, str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metadata, agreement = tokenizer_proof(folder, 420, {}, **options)
    assert all(issubclass(item.category, ConversionWarning) for item in caught)
    return metadata, agreement, "\n".join(str(item.message) for item in caught)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("case", PRE)
def test_equal_in_llama_cpp_or_flagged_with_the_rate(
    tmp_path: Path, llama_cpp: LlamaCpp, corpus: list[str], case: str, normalizer: str
) -> None:
    oracle = train(PRE[case]())
    if normalizer:
        oracle.normalizer = NORMALIZERS[normalizer]()
    metadata, agreement, said = prove(save(tmp_path, oracle, tokenizer_config=EOS))
    expected = [oracle.encode(text).ids for text in corpus]
    exact = load_tokenizer(plain(metadata))
    assert [exact.encode(text) for text in corpus] == expected
    found = llama_cpp.encode(tmp_path / "a.gguf", metadata, corpus)
    wrong = sum(a != b for a, b in zip(expected[: len(SAMPLE)], found, strict=False))
    assert agreement is not None
    assert (agreement.wrong_texts, agreement.texts) == (wrong, len(SAMPLE))
    assert (agreement.wrong_tokens > 0) == (wrong > 0)
    assert agreement.tokens == sum(map(len, expected[: len(SAMPLE)]))
    flagged = "will not tokenize exactly" in said
    assert flagged == (case not in EXACT or bool(normalizer))
    if flagged:
        assert str(agreement) in said
        # Trained with its digits apart from spaces, it has no token that llama.cpp would join them to.
        assert wrong > 0 or (case, normalizer) == ("digits", "")
        with pytest.raises(TokenizerError, match=r"(?s)will not tokenize exactly.*\(strict\)"):
            tokenizer_metadata(tmp_path, 420, {}, strict=True)
    else:
        assert found == expected
        tokenizer_metadata(tmp_path, 420, {}, strict=True)


CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+SUFFIX"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*SUFFIX"
    r"|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("name", "suffix", "digits"),
    [("gpt-4o", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"\p{N}{1,3}"), ("tekken", "", r"\p{N}")],
)
def test_splits_that_llama_cpp_approximates(
    tmp_path: Path, llama_cpp: LlamaCpp, corpus: list[str], name: str, suffix: str, digits: str
) -> None:
    """llama.cpp tells A from a but not Ə from ə: these never count as exact."""
    pattern = CASED.replace("SUFFIX", suffix).replace("DIGITS", digits)
    oracle = train(split(pattern), ignore_merges=name == "tekken")
    metadata, agreement, said = prove(save(tmp_path, oracle, tokenizer_config=EOS))
    assert f"{name!r}, is written" in said
    assert agreement is not None
    assert agreement.wrong_texts > 0
    found = llama_cpp.encode(tmp_path / "a.gguf", metadata, corpus)
    rebuilt = load_tokenizer(plain(metadata, keys.TOKENIZER_JSON))
    assert [rebuilt.encode(text, add_special=False) for text in corpus] == found


def test_a_corpus_of_ones_own(tmp_path: Path) -> None:
    """What differs on the sample may not on the user's text, and the other way round."""
    oracle = train()
    oracle.normalizer = normalizers.Lowercase()
    save(tmp_path, oracle, tokenizer_config=EOS)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("salam dünya\n" * 500, encoding="utf-8")
    _, agreement, said = prove(tmp_path, corpus=corpus)
    assert agreement is not None
    assert (agreement.wrong_tokens, agreement.rate) == (0, 0.0)
    assert agreement.tokens == sum(len(oracle.encode(text).ids) for text in corpus_texts(corpus)[1])
    assert f"all {agreement.tokens:,} tokens of corpus.txt are the same" in said
    corpus.write_text("SALAM dünya\n", encoding="utf-8")
    _, agreement, said = prove(tmp_path, corpus=corpus)
    assert agreement is not None
    assert agreement.wrong_texts == agreement.texts == 1
    assert 0 < agreement.rate < 1
    assert "of corpus.txt differ" in said


def test_a_corpus_is_cut_without_loss(tmp_path: Path) -> None:
    text = "a\r\nb\n\n" + "x" * 7001 + "\n" + PROSE * 9
    (tmp_path / "c.txt").write_bytes(text.encode())
    name, pieces = corpus_texts(tmp_path / "c.txt")
    assert name == "c.txt"
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 2000


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", None])
def test_a_corpus_that_is_no_text(tmp_path: Path, data: bytes | None) -> None:
    save(tmp_path, train(), tokenizer_config=EOS)
    corpus = tmp_path / "corpus.txt"
    if data is not None:
        corpus.write_bytes(data)
    with pytest.raises(InputFileError, match=r"corpus\.txt"):
        tokenizer_metadata(tmp_path, 420, {}, corpus=corpus)


def test_without_the_package_nothing_is_counted_and_that_is_said(tmp_path: Path) -> None:
    oracle = train()
    oracle.normalizer = normalizers.NFC()
    save(tmp_path, oracle, tokenizer_config=EOS)
    program = (
        "import sys, warnings; sys.modules['tokenizers'] = None\n"
        "from pathlib import Path\n"
        "from azquant.conversion.tokenizer import tokenizer_proof\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    assert tokenizer_proof(Path(sys.argv[1]), 420, {})[1] is None\n"
        "assert \"pip install 'azquant[text]'\" in str(caught[-1].message)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=60)


def test_a_tokenizer_that_cannot_be_applied_is_refused(tmp_path: Path) -> None:
    content = as_json(train())
    content["pre_tokenizer"]["trim_offsets"] = "maybe"
    with pytest.raises(TokenizerError, match="no usable tokenizer"):
        convert_warned(save(tmp_path, content, tokenizer_config=EOS))
