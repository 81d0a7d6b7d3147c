"""Builds ``tokenizers.Tokenizer`` objects from GGUF metadata. The only importer of ``tokenizers``, and that
lazily.

A backend only encodes; decoding is done by azquant itself (:mod:`azquant.tokenizer`), which needs no
package for it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from azquant._backend import kernels
from azquant._charsmap import Charsmap
from azquant.errors import AzquantError, MissingDependencyError, ModelError, TokenizerError
from azquant.gguf.keys import TokenType
from azquant.pretokenizer import NAMED

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "VocabularyData",
    "byte_level_backend",
    "divided",
    "guarded",
    "json_backend",
    "score_merges",
    "sentencepiece_backend",
    "unigram_backend",
]

_TEXT_TYPES = (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)


@dataclass(frozen=True)
class VocabularyData:
    """The token list of a GGUF file, checked: ``types`` is as long as ``tokens``."""

    tokens: Sequence[str]
    types: Sequence[int]


def json_backend(text: str, n_vocab: int, *, from_sentencepiece: bool = False) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes, without its truncation, padding and dropout.

    ``from_sentencepiece``: it was made of a tokenizer.model, so its character map works as SentencePiece's.

    Raises TokenizerError if ``tokenizers`` cannot read it, ModelError if it has more than ``n_vocab`` tokens.
    """
    package = _package()
    charsmap = b""
    if from_sentencepiece:
        text, charsmap = guarded(lambda: _without_charsmap(text), "tokenizer.huggingface.json")
    backend: Tokenizer = guarded(lambda: package.Tokenizer.from_str(text), "tokenizer.huggingface.json")
    if charsmap:
        normalizers = package.normalizers
        custom = normalizers.Normalizer.custom(Charsmap(charsmap))
        backend.normalizer = normalizers.Sequence([custom, backend.normalizer])
    if backend.get_vocab_size(with_added_tokens=True) > n_vocab:  # ids may be shared: these count
        most = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        if most > n_vocab:
            raise ModelError(
                f"tokenizer.huggingface.json has {most} tokens, tokenizer.ggml.tokens only {n_vocab}: they "
                "are not of one tokenizer"
            )
    # Training settings that a tokenizer.json may carry; a prompt must never be cut or changed at random by
    # them.
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None) is not None:
        backend.model.dropout = None
    return backend


def _without_charsmap(text: str) -> tuple[str, bytes]:
    """A tokenizer.json that azquant made, and the character map taken out of it."""
    content = json.loads(text)
    steps = content["normalizer"]["normalizers"]
    maps = [step for step in steps if step["type"] == "Precompiled"]
    if not maps:
        return text, b""
    content["normalizer"]["normalizers"] = [step for step in steps if step not in maps]
    return json.dumps(content), base64.b64decode(maps[0]["precompiled_charsmap"])


def byte_level_backend(vocabulary: VocabularyData, merges: Sequence[tuple[str, str]], pre: str) -> Tokenizer:
    """Byte-level BPE with the named pre-tokenizer ``pre``. Raises TokenizerError for an unknown name."""
    package = _package()
    if pre not in NAMED:
        raise TokenizerError(
            f"tokenizer.ggml.pre is {pre!r}, a pre-tokenizer azquant does not know (known: "
            f"{', '.join(sorted(NAMED))}), so text cannot be encoded; token ids can be given instead"
        )
    split = NAMED[pre]
    model = guarded(
        lambda: package.models.BPE(vocab=_ids(vocabulary), merges=merges, ignore_merges=split.ignore_merges),
        "tokenizer.ggml.tokens and tokenizer.ggml.merges",
    )
    backend: Tokenizer = package.Tokenizer(model)
    pre_tokenizers = package.pre_tokenizers
    steps = [pre_tokenizers.Split(package.Regex(pattern), "isolated") for pattern in split.patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    _add_tokens(backend, vocabulary)
    return backend


def sentencepiece_backend(
    vocabulary: VocabularyData, scores: Sequence[float], unknown: int | None, space_prefix: bool
) -> Tokenizer:
    """SentencePiece BPE: the pair whose joined token has the highest score merges first; else bytes."""
    package = _package()
    ids = _ids(vocabulary)
    model = guarded(
        lambda: package.models.BPE(
            vocab=ids,
            merges=score_merges(vocabulary, scores),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        ),
        "tokenizer.ggml.tokens",
    )
    backend: Tokenizer = package.Tokenizer(model)
    normalizers = package.normalizers
    steps = [normalizers.Prepend("▁")] if space_prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    _add_tokens(backend, vocabulary)
    return backend


def unigram_backend(
    vocabulary: VocabularyData,
    scores: Sequence[float],
    unknown: int | None,
    *,
    space_prefix: bool,
    merge_spaces: bool,
    charsmap: bytes,
) -> Tokenizer:
    """Unigram as llama.cpp's ``t5`` cuts text: the likeliest way, unknown characters as one unknown token."""
    package = _package()
    if unknown is None:
        raise TokenizerError("tokenizer.ggml.unknown_token_id is missing, which a Unigram model needs")
    low = min(scores, default=0.0)
    pieces = []
    typed = zip(vocabulary.tokens, vocabulary.types, scores, strict=True)
    for text, kind, score in typed:
        value = 0.0 if kind == TokenType.USER_DEFINED else score
        # What the text is never cut into, ranked below any unknown character.
        pieces.append((text, value if kind in _TEXT_TYPES else low - 1000.0))
    model = guarded(lambda: package.models.Unigram(pieces, unknown, False), "tokenizer.ggml.tokens")
    backend: Tokenizer = package.Tokenizer(model)
    normalizers, regex = package.normalizers, package.Regex
    steps = []
    if charsmap:
        steps.append(normalizers.Normalizer.custom(Charsmap(charsmap)))
    if merge_spaces:  # each word then has its space before it, whatever the prefix says
        steps += [normalizers.Replace(regex(r"\A +| +\z"), ""), normalizers.Replace(regex(" +"), "▁")]
    else:
        steps.append(normalizers.Replace(" ", "▁"))
    if space_prefix or merge_spaces:
        steps.append(normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence(steps)
    _add_tokens(backend, vocabulary)
    return backend


def _package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise MissingDependencyError(
            "encoding text needs the tokenizers package: pip install 'azquant[text]' (token ids work without)"
        ) from error
    return tokenizers


def guarded(make: Any, what: str) -> Any:
    """Call ``make``, turning whatever ``tokenizers`` raises into TokenizerError.

    Its panics derive from BaseException and have no public name; a file must not be able to end the program.
    """
    try:
        return make()
    except (AzquantError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise TokenizerError(f"{what}: no usable tokenizer: {error}") from error


def _ids(vocabulary: VocabularyData) -> dict[str, int]:
    ids = dict(zip(vocabulary.tokens, range(len(vocabulary.tokens)), strict=True))
    if len(ids) < len(vocabulary.tokens):
        first: dict[str, int] = {}
        for token_id, text in enumerate(vocabulary.tokens):
            if first.setdefault(text, token_id) != token_id:
                raise ModelError(
                    f"tokenizer.ggml.tokens: {first[text]} and {token_id} are the same token {text!r}"
                )
    return ids


def divided(merge: str) -> tuple[str, str]:
    """A merge's two sides, as llama.cpp reads it: the first space that is not the first character divides."""
    left, _, right = merge[1:].partition(" ")
    return merge[:1] + left, right


def score_merges(vocabulary: VocabularyData, scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece's scores as merges: every token split in two, best score first, equal ones by ids."""
    kinds = set(map(int, _TEXT_TYPES))
    typed = zip(vocabulary.tokens, vocabulary.types, scores, strict=False)  # of scores there may be more
    chosen = [(text, score) for text, kind, score in typed if kind in kinds]
    of_text = [text for text, _ in chosen]
    left, right = kernels().vocabulary_merges(of_text, [score for _, score in chosen])
    text_of = of_text.__getitem__
    return list(zip(map(text_of, left), map(text_of, right), strict=True))


def _add_tokens(backend: Tokenizer, vocabulary: VocabularyData) -> None:
    """Have control, unknown and user-defined tokens found in the text before anything is merged."""
    package = _package()
    # As numbers: an enumeration's members are slow to compare with, tens of thousands of times.
    special_kinds = {int(TokenType.CONTROL), int(TokenType.UNKNOWN)}
    user_defined = int(TokenType.USER_DEFINED)
    added = {*special_kinds, user_defined}
    special: list[Any] = []
    plain: list[Any] = []
    for i in [i for i, kind in enumerate(vocabulary.types) if kind in added]:
        text, is_special = vocabulary.tokens[i], vocabulary.types[i] in special_kinds
        if text:
            (special if is_special else plain).append(
                package.AddedToken(text, special=is_special, normalized=False)
            )
    backend.add_special_tokens(special)
    backend.add_tokens(plain)
