"""How often llama.cpp's tokenization differs from the original tokenizer's, counted on text.

llama.cpp is stood in for by azquant's own reading of the ``tokenizer.ggml.*`` keys, which the tests hold
against llama.cpp itself; the original is the tokenizer.json that the file carries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from azquant.conversion.sample import SAMPLE
from azquant.errors import InputFileError, TokenizerError
from azquant.gguf import MetadataValue, ValueType, keys
from azquant.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Agreement", "compare_tokenizers", "corpus_texts", "measure_agreement"]

_PIECE = 2000
"""Characters of a corpus that are tokenized together, cut at the ends of lines."""
MAX_CORPUS_BYTES = 64 << 20


@dataclass(frozen=True)
class Agreement:
    """What tokenizing a corpus both ways gave."""

    corpus: str
    """``"azquant's sample"``, or the file's name."""
    texts: int
    tokens: int
    """Of the original tokenizer."""
    wrong_texts: int
    wrong_tokens: int
    """Tokens of the original that llama.cpp does not give at their place."""
    example: str
    """The first text that differs, cut to where it does; empty when none does."""

    @property
    def rate(self) -> float:
        """wrong_tokens / tokens."""
        return self.wrong_tokens / self.tokens if self.tokens else 0.0

    def __str__(self) -> str:
        if not self.wrong_texts:
            return f"all {self.tokens:,} tokens of {self.corpus} are the same"
        return (
            f"{self.wrong_tokens:,} of {self.tokens:,} tokens of {self.corpus} differ ({self.rate:.2%}), in "
            f"{self.wrong_texts} of {self.texts} texts; the first: {self.example}"
        )


def corpus_texts(path: Path | None) -> tuple[str, Sequence[str]]:
    """The corpus's name and its texts: azquant's sample, or the UTF-8 file ``path`` in pieces.

    Raises InputFileError for a file that cannot be read, is empty, or has more than MAX_CORPUS_BYTES.
    """
    if path is None:
        return "azquant's sample", SAMPLE
    try:
        if path.stat().st_size > MAX_CORPUS_BYTES:
            raise InputFileError(f"{path} has more than {MAX_CORPUS_BYTES >> 20} MiB; give a part of it")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputFileError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputFileError(f"{path} is not UTF-8 text (byte {error.start})") from error
    if not text:
        raise InputFileError(f"{path} is empty; there is nothing to compare tokenizers on")
    return path.name, _pieces(text)


def _pieces(text: str) -> list[str]:
    pieces: list[str] = []
    held: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        for at in range(0, len(line), _PIECE):  # a file may be one line
            part = line[at : at + _PIECE]
            if held and size + len(part) > _PIECE:
                pieces.append("".join(held))
                held, size = [], 0
            held.append(part)
            size += len(part)
    return [*pieces, "".join(held)] if held else pieces


def measure_agreement(metadata: Mapping[str, MetadataValue], corpus: Path | None) -> Agreement:
    """Tokenize a corpus with the carried tokenizer.json and as llama.cpp does by the other keys.

    Raises MissingDependencyError without the tokenizers package, TokenizerError where either way cannot.
    """
    plain = {key: _plain(item) for key, item in metadata.items()}
    name, texts = corpus_texts(corpus)
    exact = load_tokenizer(plain)
    stand_in = load_tokenizer({key: value for key, value in plain.items() if key != keys.TOKENIZER_JSON})
    return compare_tokenizers(exact, stand_in, texts, name)


def _plain(item: MetadataValue) -> Any:
    if item.type != ValueType.ARRAY:
        return item.value
    return item.value.tolist() if hasattr(item.value, "tolist") else list(item.value)


def compare_tokenizers(exact: Tokenizer, other: Tokenizer, texts: Iterable[str], name: str) -> Agreement:
    """Count where ``other`` gives other ids than ``exact``; neither adds special tokens."""
    count = tokens = wrong_texts = wrong_tokens = 0
    example = ""
    for text in texts:
        ids = exact.encode(text, add_special=False)
        found = _encode(other, text)
        count, tokens = count + 1, tokens + len(ids)
        if ids == found:
            continue
        matcher = SequenceMatcher(None, ids, found, autojunk=False)
        same = sum(block.size for block in matcher.get_matching_blocks())
        # Tokens that are only put in count too: "no difference" must mean none.
        wrong_tokens += max(1, len(ids) - same, len(found) - same)
        wrong_texts += 1
        example = example or _example(exact, ids, found)
    return Agreement(name, count, tokens, wrong_texts, min(wrong_tokens, max(tokens, 1)), example)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode(text, add_special=False)
    except TokenizerError:  # an unknown character where there is no unknown token: llama.cpp drops it
        return []


def _example(tokenizer: Tokenizer, ids: Sequence[int], found: Sequence[int]) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(ids, found, strict=False)) if a != b), min(len(ids), len(found))
    )
    start = max(0, at - 1)
    shown = [" ".join(tokenizer.token(i) for i in part[start : at + 4]) for part in (ids, found)]
    return f"{shown[0]!r} is {shown[1]!r} in llama.cpp"
