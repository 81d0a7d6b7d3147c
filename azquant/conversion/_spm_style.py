"""SentencePiece-style tokenizers for llama.cpp: BPE over raw text (model ``llama``) and Unigram (``t5``).

A tokenizer.json says with normalizers and pre-tokenizers what SentencePiece says with three flags. They are
read back into the flags here; what is left over is a difference that llama.cpp does not compute.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from azquant.conversion._tokenizer_files import expect
from azquant.conversion._vocabulary import Vocabulary, read_merges
from azquant.errors import TokenizerError
from azquant.gguf import MetadataValue, ValueType, keys
from azquant.gguf.keys import TokenType, array, boolean, string

__all__ = ["SpaceRules", "bpe_metadata", "has_all_bytes", "space_rules", "unigram_metadata"]

_SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_NEVER = -1e9
"""Score of a token that no merge makes: llama.cpp would otherwise make it first."""


@dataclass
class SpaceRules:
    """How text is prepared before it is cut, in SentencePiece's words."""

    escaped: bool = False
    """Spaces become U+2581."""
    prefix: bool = False
    """One is put before the text."""
    merge: bool = False
    """Runs of spaces count as one, those at the ends as none."""
    words: bool = False
    """Text is cut before every space, so that no token reaches over one."""
    charsmap: bytes = b""
    differences: list[str] = field(default_factory=list)


def space_rules(tokenizer: Mapping[str, Any], where: str) -> SpaceRules:
    """Read ``normalizer`` and ``pre_tokenizer`` of a tokenizer.json that is not byte-level."""
    rules = SpaceRules()
    for step in _steps(tokenizer.get("normalizer"), "normalizers"):
        _read_normalizer(step, rules, where)
    for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        kind = step.get("type")
        if kind == "Metaspace":
            _read_metaspace(step, rules)
        elif kind == "WhitespaceSplit":
            rules.merge = True
        elif kind == "Split" and step.get("pattern") == {"String": " "} and rules.escaped:
            pass  # Gemma's: no space is left to split at
        else:
            rules.differences.append(f"it has a {kind} step")
    return rules


def _steps(node: object, inner: str) -> list[Mapping[str, Any]]:
    steps: list[Mapping[str, Any]] = []
    waiting = [node]
    while waiting:
        step = waiting.pop()
        if isinstance(step, Mapping):
            nested = step.get(inner)
            if step.get("type") == "Sequence" and isinstance(nested, list):
                waiting.extend(reversed(nested))
            else:
                steps.append(step)
    return steps


def _read_normalizer(step: Mapping[str, Any], rules: SpaceRules, where: str) -> None:
    kind = step.get("type")
    pattern = step.get("pattern")
    if kind == "Prepend" and step.get("prepend") == _SPACE:
        rules.prefix = True
    elif kind == "Precompiled":
        text = step.get("precompiled_charsmap")
        try:
            rules.charsmap = base64.b64decode(expect(text, str, f"{where}: precompiled_charsmap", "a string"))
        except (binascii.Error, ValueError) as error:
            raise TokenizerError(f"{where}: normalizer: precompiled_charsmap is no base64") from error
    elif kind == "Replace" and pattern == {"String": " "} and step.get("content") == _SPACE:
        rules.escaped = True
    elif kind == "Replace" and isinstance(pattern, Mapping) and pattern.get("Regex") == r"\A +| +\z":
        rules.merge = True
    elif kind == "Replace" and isinstance(pattern, Mapping) and pattern.get("Regex") in (" {2,}", " +"):
        rules.merge = True
        rules.escaped = rules.escaped or step.get("content") == _SPACE
    elif kind == "Strip":
        rules.merge = True
    elif step:
        rules.differences.append(f"it normalizes text first ({kind}), which llama.cpp does not")


def _read_metaspace(step: Mapping[str, Any], rules: SpaceRules) -> None:
    if step.get("replacement", _SPACE) != _SPACE:
        rules.differences.append(f"its Metaspace writes spaces as {step.get('replacement')!r}")
    rules.escaped = True
    scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
    rules.prefix = scheme != "never"
    if rules.prefix:
        rules.differences.append("its Metaspace puts no space before text that begins with one")
    if scheme == "first":
        rules.differences.append("its Metaspace puts no space before text that follows a special token")
    rules.words = bool(step.get("split", True))


def has_all_bytes(vocabulary: Vocabulary) -> bool:
    """Whether each byte has a token ``<0xXX>``; llama.cpp ends at the first unknown character without."""
    return all(f"<0x{byte:02X}>" in vocabulary.ids for byte in range(256))


def bpe_metadata(
    tokenizer: Mapping[str, Any], vocabulary: Vocabulary, rules: SpaceRules, where: str
) -> tuple[dict[str, MetadataValue], list[str]]:
    """The keys of a SentencePiece-style BPE with all bytes, and how llama.cpp differs from it.

    llama.cpp merges the pair whose joined token has the highest score, so a token's score is minus the rank
    of the first merge that makes it.
    """
    model = tokenizer["model"]
    merges = read_merges(model, vocabulary.ids | dict.fromkeys(model["vocab"], 0), where)
    scores = np.full(len(vocabulary), _NEVER, np.float32)
    for rank, merge in reversed(list(enumerate(merges))):
        left, _, right = merge[1:].partition(" ")
        token_id = vocabulary.ids.get(merge[0] + left + right)
        if token_id is not None:
            scores[token_id] = -rank
    _mark_types(vocabulary, model.get("unk_token"))
    differences = list(rules.differences)
    if rules.charsmap:
        differences.append("it normalizes characters first (Precompiled), which llama.cpp does not for BPE")
    if rules.merge:
        differences.append("it drops superfluous spaces, which llama.cpp does not for BPE")
    if model.get("ignore_merges") is True:
        differences.append("the model says ignore_merges=True, llama.cpp always merges")
    differences += _over_spaces(vocabulary, rules)
    return {
        keys.TOKENIZER_MODEL: string("llama"),
        keys.TOKENIZER_PRE: string("default"),
        keys.SCORES: array(ValueType.FLOAT32, scores),
        keys.ADD_SPACE_PREFIX: boolean(rules.prefix),
    }, differences


def unigram_metadata(
    tokenizer: Mapping[str, Any], vocabulary: Vocabulary, rules: SpaceRules, where: str
) -> tuple[dict[str, MetadataValue], list[str]]:
    """The keys of a Unigram model, and how llama.cpp differs from it."""
    model = tokenizer["model"]
    scores = np.zeros(len(vocabulary), np.float32)
    for index, entry in enumerate(model["vocab"]):
        at = f"{where}: model.vocab[{index}]"
        score = entry[1] if len(entry) > 1 else None
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise TokenizerError(
                f"{at} must be a [piece, score] pair with a finite score, found {score!r:.40}"
            )
        if vocabulary.ids.get(entry[0]) == index:
            scores[index] = score
    unknown = model["vocab"][model["unk_id"]][0]
    _mark_types(vocabulary, unknown)
    differences = list(rules.differences)
    if model.get("byte_fallback") is True:
        differences.append("it falls back to bytes, where llama.cpp's Unigram gives the unknown token")
    differences += _over_spaces(vocabulary, rules)
    metadata = {
        keys.TOKENIZER_MODEL: string("t5"),
        keys.TOKENIZER_PRE: string("default"),
        keys.SCORES: array(ValueType.FLOAT32, scores),
        keys.ADD_SPACE_PREFIX: boolean(rules.prefix),
        keys.REMOVE_EXTRA_WHITESPACES: boolean(rules.merge),
    }
    if rules.charsmap:
        metadata[keys.PRECOMPILED_CHARSMAP] = array(ValueType.UINT8, np.frombuffer(rules.charsmap, np.uint8))
    return metadata, differences


def _mark_types(vocabulary: Vocabulary, unknown: object) -> None:
    """Byte tokens and the unknown token, which reconcile() takes for ordinary ones."""
    for token_id, text in enumerate(vocabulary.tokens):
        if text == unknown:
            vocabulary.types[token_id] = int(TokenType.UNKNOWN)
        elif _BYTE.fullmatch(text) and vocabulary.types[token_id] == TokenType.NORMAL:
            vocabulary.types[token_id] = int(TokenType.BYTE)


def _over_spaces(vocabulary: Vocabulary, rules: SpaceRules) -> list[str]:
    """Tokens with a space inside never arise where text is cut at spaces first; llama.cpp would make them."""
    if not rules.words:
        return []
    typed = zip(vocabulary.tokens, vocabulary.types, strict=True)
    inner = [text for text, kind in typed if kind == TokenType.NORMAL and _SPACE in text[1:]]
    if not inner:
        return []
    return [f"its Metaspace cuts at spaces, so {len(inner)} tokens such as {inner[0]!r} are never used"]
