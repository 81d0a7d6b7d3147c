"""Reads a SentencePiece model (tokenizer.model) and says the same as a tokenizer.json.

Source of the format: sentencepiece_model.proto of github.com/google/sentencepiece. Only the
fields that decide how text becomes ids are read; others are skipped, as protobuf means it.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from azquant._tokenizer_backend import VocabularyData, score_merges
from azquant.errors import TokenizerError
from azquant.gguf.keys import TokenType

__all__ = ["SentencePieceModel", "read_sentencepiece", "tokenizer_json"]

_UNIGRAM, _BPE = 1, 2
_KINDS = {_UNIGRAM: "Unigram", _BPE: "BPE", 3: "Word", 4: "Char"}
_MAX_PIECES = 1 << 22


@dataclass
class SentencePieceModel:
    """The fields of a ModelProto that matter, with the format's defaults."""

    pieces: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    """As GGUF's TokenType: the numbers are the same."""
    kind: int = _UNIGRAM
    byte_fallback: bool = False
    suffix: bool = False
    """treat_whitespace_as_suffix."""
    special: dict[str, int] = field(default_factory=lambda: {"unk": 0, "bos": 1, "eos": 2, "pad": -1})
    charsmap: bytes = b""
    add_prefix: bool = True
    merge_spaces: bool = True
    escape: bool = True


def read_sentencepiece(data: bytes, where: str) -> SentencePieceModel:
    """Parse ``data``. Raises TokenizerError for bytes that are no such model, with the offset."""
    model = SentencePieceModel()
    for number, value, at in _fields(data, 0, len(data), where):
        if number == 1:
            _read_piece(model, data, _span(value, at, where), where)
        elif number == 2:
            for key, content, position in _fields(data, *_span(value, at, where), where):
                _read_trainer(model, key, content, f"{where}: byte {position}")
        elif number == 3:
            _read_normalizer(model, data, _span(value, at, where), where)
    if not model.pieces:
        raise TokenizerError(f"{where} has no pieces: this is no SentencePiece model")
    if len(set(model.pieces)) != len(model.pieces):
        raise TokenizerError(f"{where} lists a piece twice: the model is damaged")
    return model


def _fields(data: bytes, start: int, stop: int, where: str) -> Iterator[tuple[int, Any, int]]:
    """(field number, value, offset) of one message; a length-delimited value is a (start, stop) span."""
    at = start
    while at < stop:
        begin = at
        tag, at = _varint(data, at, stop, where)
        wire = tag & 7
        value: Any
        if wire == 0:
            value, at = _varint(data, at, stop, where)
        elif wire == 2:
            size, at = _varint(data, at, stop, where)
            value, at = (at, at + size), at + size
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            value, at = (data[at : at + size] if at + size <= stop else b""), at + size
        else:
            raise TokenizerError(f"{where}: byte {begin}: wire type {wire}: this is no SentencePiece model")
        if at > stop:
            raise TokenizerError(
                f"{where}: byte {begin}: the field ends at byte {at}, beyond {stop}: cut short"
            )
        yield tag >> 3, value, begin


def _varint(data: bytes, at: int, stop: int, where: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= stop:
            raise TokenizerError(f"{where}: byte {at}: the file is cut short, or no SentencePiece model")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise TokenizerError(f"{where}: byte {at}: a number without end: this is no SentencePiece model")


def _span(value: Any, at: int, where: str) -> tuple[int, int]:
    if not isinstance(value, tuple):
        raise TokenizerError(f"{where}: byte {at}: a message was expected: this is no SentencePiece model")
    return value


def _read_piece(model: SentencePieceModel, data: bytes, span: tuple[int, int], where: str) -> None:
    text, score, kind = "", 0.0, 1
    for number, value, at in _fields(data, *span, where):
        if number == 1:
            start, stop = _span(value, at, where)
            try:
                text = data[start:stop].decode("utf-8")
            except UnicodeDecodeError as error:
                raise TokenizerError(
                    f"{where}: byte {start}: piece {len(model.pieces)} is not UTF-8"
                ) from error
        elif number == 2 and isinstance(value, bytes) and len(value) == 4:
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            kind = value
    if not text or kind not in range(1, 7) or not math.isfinite(score):
        raise TokenizerError(
            f"{where}: byte {span[0]}: piece {len(model.pieces)} is {text!r:.40} with score {score} and type "
            f"{kind}: the model is damaged"
        )
    if len(model.pieces) >= _MAX_PIECES:
        raise TokenizerError(f"{where} has more than {_MAX_PIECES} pieces")
    model.pieces.append(text)
    model.scores.append(score)
    model.types.append(kind)


def _read_trainer(model: SentencePieceModel, number: int, value: Any, where: str) -> None:
    ids = {40: "unk", 41: "bos", 42: "eos", 43: "pad"}
    if not isinstance(value, int):
        return
    if number == 3:
        if value not in _KINDS:
            raise TokenizerError(f"{where}: model type {value} is none that SentencePiece has")
        model.kind = value
    elif number == 24:
        model.suffix = bool(value)
    elif number == 35:
        model.byte_fallback = bool(value)
    elif number in ids:
        model.special[ids[number]] = value - (1 << 64) if value >> 63 else value


def _read_normalizer(model: SentencePieceModel, data: bytes, span: tuple[int, int], where: str) -> None:
    for number, value, _ in _fields(data, *span, where):
        if number == 2 and isinstance(value, tuple):
            model.charsmap = data[slice(*value)]
        elif number == 3 and isinstance(value, int):
            model.add_prefix = bool(value)
        elif number == 4 and isinstance(value, int):
            model.merge_spaces = bool(value)
        elif number == 5 and isinstance(value, int):
            model.escape = bool(value)


def tokenizer_json(model: SentencePieceModel, where: str) -> dict[str, Any]:
    """The tokenizer.json that tokenizes as ``model`` does.

    Raises TokenizerError for what no tokenizer.json says: word and character models, spaces as suffixes.
    """
    if model.kind not in (_UNIGRAM, _BPE):
        raise TokenizerError(
            f"{where}: a SentencePiece model of type {_KINDS[model.kind]}; BPE and Unigram are supported"
        )
    if model.suffix or not model.escape:
        option = "treat_whitespace_as_suffix=true" if model.suffix else "escape_whitespaces=false"
        raise TokenizerError(f"{where} was trained with {option}, which is not supported")
    added = [
        {
            "id": token_id,
            "content": piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != TokenType.USER_DEFINED,
        }
        for token_id, (piece, kind) in enumerate(zip(model.pieces, model.types, strict=True))
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    ]
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.add_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(model)},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(model, where) if model.kind == _BPE else _unigram(model, where),
    }


def _normalizers(model: SentencePieceModel) -> list[dict[str, Any]]:
    """In SentencePiece's order: characters, superfluous spaces, the space before the text, the escape."""
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        encoded = base64.b64encode(model.charsmap).decode("ascii")
        steps.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    if model.merge_spaces:
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if model.add_prefix:
        steps.append({"type": "Prepend", "prepend": "▁"})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    return steps


def _unknown(model: SentencePieceModel, where: str) -> int:
    unknown = model.special["unk"]
    if not 0 <= unknown < len(model.pieces):
        raise TokenizerError(f"{where}: unk_id is {unknown}, but there are {len(model.pieces)} pieces")
    return unknown


def _unigram(model: SentencePieceModel, where: str) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": _unknown(model, where),
        "vocab": [[piece, score] for piece, score in zip(model.pieces, model.scores, strict=True)],
        "byte_fallback": model.byte_fallback,
    }


def _bpe(model: SentencePieceModel, where: str) -> dict[str, Any]:
    merges = score_merges(VocabularyData(model.pieces, model.types), model.scores)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.pieces[_unknown(model, where)],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece: token_id for token_id, piece in enumerate(model.pieces)},
        "merges": [list(pair) for pair in merges],
    }
