"""Text to token ids and back, from the metadata of a GGUF file.

Encoding is done by the ``tokenizers`` package, imported when the first text comes: with the original
tokenizer.json where the file carries it (``tokenizer.huggingface.json``; azquant's converter always writes
it), else rebuilt from the ``tokenizer.ggml.*`` keys. Decoding needs no package.
"""

from __future__ import annotations

import codecs
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

from azquant._tokenizer_backend import (
    VocabularyData,
    byte_level_backend,
    divided,
    guarded,
    json_backend,
    sentencepiece_backend,
    unigram_backend,
)
from azquant.errors import AzquantError, ModelError, TokenizerError
from azquant.gguf import GGUFArray, keys
from azquant.gguf.keys import TokenType
from azquant.pretokenizer import CHAR_TO_BYTE, NAMED

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

__all__ = ["StreamDecoder", "Tokenizer", "load_tokenizer"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UNSEEN = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.UNUSED)


def load_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer of a GGUF file, from its ``metadata`` (plain values; arrays as sequences).

    A file without a tokenizer (``no_vocab``), or with one of a kind azquant does not run, gives a Tokenizer
    too: its ids and sizes can be read, encoding and decoding raise TokenizerError.

    Raises ModelError for metadata that contradicts itself: a special id outside the vocabulary, lists of
    different lengths, malformed byte tokens, values of the wrong type. What only ``tokenizers`` can find
    wrong is raised as TokenizerError by the first :meth:`Tokenizer.encode`.
    """
    return Tokenizer(metadata)


class Tokenizer:
    """Turns text into token ids and ids into text. Safe to use from several threads.

    ``bos_id`` and ``eos_id`` are ``None`` when the file has none. ``end_ids`` are all ids that end a text
    (EOS and, in chats, the end of a turn), ``special_ids`` those that stand for no text. ``chat_template``
    is the raw Jinja source, never executed here.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.model = _typed(metadata, keys.TOKENIZER_MODEL, str, "no_vocab")
        self._json: str | None = _typed(metadata, keys.TOKENIZER_JSON, str, None)
        self._from_sentencepiece = metadata.get(keys.TOKENIZER_SOURCE) == "sentencepiece"
        self._pre: str = _typed(metadata, keys.TOKENIZER_PRE, str, "default")
        self.chat_template: str | None = _typed(metadata, keys.CHAT_TEMPLATE, str, None)
        self._tokens: list[str] = _list(metadata, keys.TOKENS, str)
        self.n_vocab = len(self._tokens) or _declared_size(metadata)
        self.bos_id = _token_id(metadata, keys.BOS_TOKEN_ID, self.n_vocab)
        self.eos_id = _token_id(metadata, keys.EOS_TOKEN_ID, self.n_vocab)
        self._unknown_id = _token_id(metadata, keys.UNKNOWN_TOKEN_ID, self.n_vocab)
        eot_id = _token_id(metadata, keys.EOT_TOKEN_ID, self.n_vocab)
        self.end_ids = frozenset(token_id for token_id in (self.eos_id, eot_id) if token_id is not None)
        self._problem = self._find_problem()
        self._unigram = self.model == "t5"
        self._sentencepiece = self.model == "llama" or self._unigram
        self._types = self._read_types(metadata)
        special = {int(TokenType.CONTROL), int(TokenType.UNKNOWN)}  # members are slow to compare with
        self.special_ids = frozenset(
            [token_id for token_id, kind in enumerate(self._types) if kind in special]
        )
        split = NAMED.get(self._pre) if self.model == "gpt2" else None
        starts = self.model == "llama" or (split is not None and split.add_bos)
        self.add_bos = self._read_flag(metadata, keys.ADD_BOS_TOKEN, self.bos_id, starts)
        self.add_eos = self._read_flag(metadata, keys.ADD_EOS_TOKEN, self.eos_id, self._unigram)
        self._space_prefix = self._sentencepiece and _typed(
            metadata, keys.ADD_SPACE_PREFIX, bool, not self._unigram
        )
        self._merge_spaces: bool = _typed(metadata, keys.REMOVE_EXTRA_WHITESPACES, bool, False)
        self._charsmap: Any = metadata.get(keys.PRECOMPILED_CHARSMAP)
        self._merges: Any = metadata.get(keys.MERGES)
        self._scores: list[float] = _list(metadata, keys.SCORES, float) if self._sentencepiece else []
        if self._scores and len(self._scores) < self.n_vocab:
            raise ModelError(f"{keys.SCORES} has {len(self._scores)} entries for {self.n_vocab} tokens")
        self._lock = threading.Lock()
        self._backends: dict[bool, Backend] = {}
        self._pieces: dict[int, bytes] = {}

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the token ids of ``text``.

        ``add_special`` puts BOS before it and EOS after it where the file says so
        (``tokenizer.ggml.add_bos_token``; without that key as llama.cpp does: BOS for SentencePiece models
        and Llama 3, nothing for others). ``parse_special`` recognizes the texts of special tokens
        (``"<|endoftext|>"``) in ``text``, as llama.cpp's server does for prompts; switch it off for text that
        is not to be trusted.

        Raises TokenizerError for text that is no Unicode text (lone surrogates) or when the file has no
        tokenizer for text, MissingDependencyError without the ``tokenizers`` package.
        """
        if not isinstance(text, str):
            raise TokenizerError(f"text must be a str, found {type(text).__name__}")
        self._check_usable()
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at index {error.start}, "
                "which is no Unicode text"
            ) from error
        backend = self._backend(parse_special)
        encoding = guarded(lambda: backend.encode(text, add_special_tokens=False), "encoding text")
        ids: list[int] = encoding.ids
        if ids and max(ids) >= self.n_vocab:
            raise TokenizerError(
                f"the tokenizer gives id {max(ids)} for this text, the vocabulary has {self.n_vocab} entries"
            )
        before = [self.bos_id] if add_special and self.add_bos and self.bos_id is not None else []
        after = [self.eos_id] if add_special and self.add_eos and self.eos_id is not None else []
        return [*before, *ids, *after]

    def prepare(self) -> None:
        """Build now what the first :meth:`encode` would build. What is wrong with it, encode says."""
        if self._problem is None:
            with suppress(AzquantError):
                self._backend(True)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of ``ids``. Bytes that are no UTF-8 become U+FFFD.

        ``skip_special`` leaves out control, unknown and unused tokens. Of SentencePiece models the space
        that stands before the first word is dropped. Raises TokenizerError for an id outside the
        vocabulary.
        """
        if self._is_foreign() and self._problem is None:
            ids = list(ids)
            for token_id in ids:
                self._check_id(token_id)
            backend = self._backend(True)
            text: str = guarded(lambda: backend.decode(ids, skip_special_tokens=skip_special), "decoding ids")
            return text
        decoder = self.stream_decoder(skip_special=skip_special)
        return "".join([decoder.push(token_id) for token_id in ids]) + decoder.flush()

    @property
    def can_encode(self) -> bool:
        """Whether the file has a tokenizer for text that azquant can run."""
        return self._problem is None

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token in the vocabulary, at least 1."""
        return max(map(len, self._tokens), default=1) or 1

    def stream_decoder(self, skip_special: bool = True, after: Iterable[int] = ()) -> StreamDecoder:
        """Return a decoder for ids that come one at a time; its pieces join to exactly :meth:`decode`'s text.

        ``after`` are ids that come before the first one pushed (a prompt): only what follows them is given
        out.
        """
        self._check_usable()
        kind = _WholeDecoder if self._is_foreign() else StreamDecoder
        decoder = kind(self, skip_special)
        decoder.skip(after)
        return decoder

    def token(self, token_id: int) -> str:
        """Return the text of one token as it stands in the vocabulary. Raises TokenizerError for a bad id."""
        self._check_id(token_id)
        return self._tokens[token_id] if self._tokens else ""

    def piece(self, token_id: int, skip_special: bool = True) -> bytes:
        """Return the bytes that a token adds to the text; a character may be spread over several tokens."""
        self._check_usable()
        self._check_id(token_id)
        if skip_special and self._types[token_id] in _UNSEEN:
            return b""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._make_piece(token_id)
        return piece

    def _make_piece(self, token_id: int) -> bytes:
        text, kind = self._tokens[token_id], self._types[token_id]
        if kind == TokenType.BYTE:
            match = _BYTE_TOKEN.fullmatch(text)
            return bytes([int(match[1], 16)]) if match else b""
        if kind == TokenType.NORMAL:
            if self._sentencepiece:
                text = text.replace("▁", " ")
            else:
                byte_values = [CHAR_TO_BYTE.get(char) for char in text]
                if None not in byte_values:
                    return bytes(value for value in byte_values if value is not None)
        try:
            return text.encode(
                "utf-8", "surrogateescape"
            )  # undoes what the GGUF reader does to invalid bytes
        except UnicodeEncodeError:
            return text.encode("utf-8", "replace")

    def _backend(self, parse_special: bool) -> Backend:
        with self._lock:
            backend = self._backends.get(parse_special)
            if backend is None:
                backend = self._build_backend()
                backend.encode_special_tokens = not parse_special
                self._backends[parse_special] = backend
            return backend

    def _build_backend(self) -> Backend:
        if self._json is not None:
            return json_backend(self._json, self.n_vocab, from_sentencepiece=self._from_sentencepiece)
        vocabulary = VocabularyData(self._tokens, self._types)
        if self._sentencepiece:
            scores = self._scores or [0.0] * self.n_vocab
            unknown = self._unknown_id
            if unknown is None and TokenType.UNKNOWN in self._types:
                unknown = self._types.index(TokenType.UNKNOWN)
            if self._unigram:
                return unigram_backend(
                    vocabulary,
                    scores,
                    unknown,
                    space_prefix=self._space_prefix,
                    merge_spaces=self._merge_spaces,
                    charsmap=_bytes(self._charsmap),
                )
            return sentencepiece_backend(vocabulary, scores, unknown, self._space_prefix)
        halves = self._merges.halves() if isinstance(self._merges, GGUFArray) else None
        if halves is None:
            halves = [divided(merge) for merge in _list({keys.MERGES: self._merges}, keys.MERGES, str)]
        return byte_level_backend(vocabulary, halves, self._pre)

    def _find_problem(self) -> str | None:
        if self._json is not None or self.model in ("gpt2", "llama", "t5"):
            if self._tokens:
                return None
            raise ModelError(
                f"{keys.TOKENIZER_MODEL} is {self.model!r}, but {keys.TOKENS} is missing or empty"
            )
        if self.model in ("no_vocab", "none"):
            return "this model has no tokenizer; give token ids instead of text"
        return (
            f"its tokenizer is of the kind {self.model!r}, which azquant cannot run; give token ids "
            "instead of text"
        )

    def _check_usable(self) -> None:
        if self._problem is not None:
            raise TokenizerError(self._problem)

    def _is_foreign(self) -> bool:
        """Whether only the carried tokenizer.json knows how ids become text."""
        return self.model not in ("gpt2", "llama") and self._json is not None

    def _check_id(self, token_id: int) -> None:
        if not 0 <= token_id < self.n_vocab:
            raise TokenizerError(f"token id {token_id} is outside the vocabulary of {self.n_vocab} entries")

    def _read_flag(self, metadata: Mapping[str, Any], key: str, token_id: int | None, default: bool) -> bool:
        flag: bool = _typed(metadata, key, bool, default and token_id is not None)
        if flag and token_id is None:
            raise ModelError(f"{key} is true, but the file names no such token")
        return flag

    def _read_types(self, metadata: Mapping[str, Any]) -> list[int]:
        types: list[int] = _list(metadata, keys.TOKEN_TYPE, int)
        if types and len(types) != len(self._tokens):
            raise ModelError(f"{keys.TOKEN_TYPE} has {len(types)} entries for {len(self._tokens)} tokens")
        if not types:
            types = [int(TokenType.NORMAL)] * len(self._tokens)
            if self._sentencepiece:  # such files leave it to the texts
                self._guess_types(types)
        if self._sentencepiece:
            byte = int(TokenType.BYTE)
            for token_id in (i for i, kind in enumerate(types) if kind == byte):
                if not _BYTE_TOKEN.fullmatch(self._tokens[token_id]):
                    raise ModelError(
                        f"{keys.TOKENS}[{token_id}] is a byte token with the text "
                        f"{self._tokens[token_id][:40]!r}; it must be '<0x00>' to '<0xFF>'"
                    )
        return types

    def _guess_types(self, types: list[int]) -> None:
        for token_id, text in enumerate(self._tokens):
            if _BYTE_TOKEN.fullmatch(text):
                types[token_id] = TokenType.BYTE
        for special_id, kind in (
            (self.bos_id, TokenType.CONTROL),
            (self.eos_id, TokenType.CONTROL),
            (self._unknown_id, TokenType.UNKNOWN),
        ):
            if special_id is not None:
                types[special_id] = kind


class StreamDecoder:
    """Gives out text as soon as it is whole: a character spread over tokens waits for its last byte."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = tokenizer._space_prefix

    def push(self, token_id: int) -> str:
        """Take the next id; return the text that is complete now, often empty. Raises TokenizerError."""
        piece = self._tokenizer.piece(token_id, self._skip_special)
        if piece and self._drop_space:
            self._drop_space = False
            piece = piece.removeprefix(b" ")
        return self._bytes.decode(piece)

    def skip(self, ids: Iterable[int]) -> None:
        """Take ids whose text is not wanted, only its influence on what follows."""
        for token_id in ids:
            self.push(token_id)

    def flush(self) -> str:
        """Return what is still held back: U+FFFD for a character that never became whole."""
        return self._bytes.decode(b"", final=True)


class _WholeDecoder(StreamDecoder):
    """For decoders that only ``tokenizers`` has: decodes all ids anew and gives out what is settled.

    Such a decoder may change the end of the text when a token follows, so what one more token left alone
    counts as settled.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        super().__init__(tokenizer, skip_special)
        self._backend = tokenizer._backend(True)
        self._ids: list[int] = []
        self._last = ""
        self._given = 0

    def skip(self, ids: Iterable[int]) -> None:
        self._ids = [*self._ids, *ids]
        self._last = self._backend.decode(self._ids, skip_special_tokens=self._skip_special)
        self._given = len(self._last.rstrip("\ufffd"))

    def push(self, token_id: int) -> str:
        self._tokenizer._check_id(token_id)
        self._ids.append(token_id)
        text: str = self._backend.decode(self._ids, skip_special_tokens=self._skip_special)
        settled = next((at for at, (a, b) in enumerate(zip(text, self._last, strict=False)) if a != b), None)
        if settled is None:
            settled = min(len(text), len(self._last))
        self._last = text
        return self._take(text.rstrip("\ufffd")[:settled])

    def flush(self) -> str:
        return self._take(self._last)

    def _take(self, text: str) -> str:
        piece = text[self._given :]
        self._given = max(self._given, len(text))
        return piece


def _typed(metadata: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = metadata.get(key)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise ModelError(f"{key} must be of type {kind.__name__}, found {type(value).__name__}")
    return value


def _token_id(metadata: Mapping[str, Any], key: str, n_vocab: int) -> int | None:
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise ModelError(f"{key} must be an integer, found {type(value).__name__}")
    if value < 0 or (n_vocab and value >= n_vocab):
        raise ModelError(f"{key} is {value}, but the vocabulary has {n_vocab} entries")
    return value


def _list(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    """The array under ``key`` as a list, empty when absent; ints pass for floats."""
    value = metadata.get(key)
    if value is None:
        return []
    items: Any = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(items, Sequence) or isinstance(items, (str, bytes)):
        raise ModelError(f"{key} must be an array, found {type(value).__name__}")
    kinds = (int, float) if kind is float else (kind,)
    found = set(map(type, items)) - set(kinds)
    if found:
        raise ModelError(f"{key} must hold {kind.__name__} values, found {found.pop().__name__}")
    return list(items)


def _bytes(value: Any) -> bytes:
    """An array of bytes, signed or not; none at all is empty."""
    items = _list({keys.PRECOMPILED_CHARSMAP: value}, keys.PRECOMPILED_CHARSMAP, int)
    try:
        return bytes(item & 255 for item in items)
    except TypeError:
        raise ModelError(f"{keys.PRECOMPILED_CHARSMAP} must hold bytes") from None


def _declared_size(metadata: Mapping[str, Any]) -> int:
    """The vocabulary's size where no tokens are listed."""
    architecture = metadata.get(keys.ARCHITECTURE)
    value = metadata.get(keys.of_architecture(str(architecture), keys.VOCAB_SIZE))
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0
