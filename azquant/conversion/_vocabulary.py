"""One reconcile pass over a vocabulary: model tokens, added tokens, padding, holes, duplicates."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from azquant.conversion._tokenizer_files import TokenizerFiles, expect, short_repr, warn
from azquant.errors import ConversionError, TokenizerError
from azquant.gguf.keys import TokenType

__all__ = ["AddedToken", "Vocabulary", "read_merges", "reconcile"]

_MAX_ID = 2**31 - 1
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text before anything else is done to it."""

    content: str
    id: int
    special: bool
    where: str


@dataclass
class Vocabulary:
    """The token list as GGUF wants it: one unique text and one type for each row of the embedding."""

    tokens: list[str]
    types: list[int]
    ids: dict[str, int]
    """Of each real token; padding is not in it."""
    extra: list[AddedToken]
    """Added tokens that tokenizer.json does not know."""

    def __len__(self) -> int:
        return len(self.tokens)


def reconcile(files: TokenizerFiles, vocab_size: int) -> Vocabulary:
    """Bring the tokens of ``files`` into a list of exactly ``vocab_size`` entries.

    Raises ConversionError when the tokenizer has more tokens than the model has rows, TokenizerError for
    entries of the wrong type. Warns of ids with two tokens; missing ids become ``[PAD<id>]`` of type UNUSED.
    """
    tokenizer = files.tokenizer or {}
    where = f"{files.folder / files.name}"
    model = expect(tokenizer.get("model"), dict, f"{where}: model", "an object")
    ids = _model_ids(model, where)
    by_id: dict[int, str] = {}
    for text, token_id in ids.items():
        if token_id in by_id:
            warn(
                f"{where}: {by_id[token_id]!r} and {text!r} both have id {token_id}; GGUF holds one text "
                "an id, the first is kept"
            )
            continue
        by_id[token_id] = text
    types: dict[int, int] = dict.fromkeys(by_id, int(TokenType.NORMAL))
    listed = list(_listed_tokens(tokenizer, where))
    extra = _unlisted_tokens(files, ids, {token.content for token in listed})
    # An added token that the model does not know gets the next free id, whatever its entry says: so does
    # `tokenizers`, and the model was trained with what that gave.
    next_id = len(ids)
    for token in (*listed, *extra):
        token_id = ids.setdefault(token.content, next_id)
        next_id = max(next_id, token_id + 1)
        if token_id != token.id:
            warn(f"{token.where}: {token.content!r} is given id {token.id}, but its id is {token_id}")
        if by_id.get(token_id, token.content) != token.content:
            warn(
                f"{token.where}: id {token_id} is {by_id[token_id]!r} in model.vocab; {token.content!r} is "
                "kept"
            )
            ids.pop(by_id[token_id], None)
        by_id[token_id] = token.content
        types[token_id] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    _check_size(by_id, vocab_size, where)
    return _lay_out(by_id, types, ids, extra, vocab_size, where)


def _model_ids(model: Mapping[str, Any], where: str) -> dict[str, int]:
    """Token -> id of a model: an object (BPE, WordPiece, WordLevel) or a list of scored pieces (Unigram)."""
    vocab = expect(model.get("vocab"), (dict, list), f"{where}: model.vocab", "an object or a list")
    if isinstance(vocab, dict):
        for token, token_id in vocab.items():
            if type(token_id) is not int or not 0 <= token_id <= _MAX_ID:
                _check_id(token_id, f"{where}: model.vocab[{token!r}]")
        return dict(vocab)
    ids: dict[str, int] = {}
    for index, entry in enumerate(vocab):
        pair = expect(entry, list, f"{where}: model.vocab[{index}]", "a [piece, score] pair")
        if not pair:
            raise TokenizerError(f"{where}: model.vocab[{index}] must be a [piece, score] pair, found []")
        ids.setdefault(expect(pair[0], str, f"{where}: model.vocab[{index}][0]", "a string"), index)
    return ids


def _check_id(value: object, where: str) -> int:
    token_id: int = expect(value, int, where, "a token id (an integer)")
    if not 0 <= token_id <= _MAX_ID:
        raise TokenizerError(f"{where} must be a token id from 0 to {_MAX_ID}, found {token_id}")
    return token_id


def _listed_tokens(tokenizer: Mapping[str, Any], where: str) -> Iterator[AddedToken]:
    """The ``added_tokens`` of tokenizer.json."""
    entries = tokenizer.get("added_tokens")
    unheeded: list[str] = []
    for index, entry in enumerate(
        expect([] if entries is None else entries, list, f"{where}: added_tokens", "a list")
    ):
        at = f"{where}: added_tokens[{index}]"
        expect(entry, dict, at, "an object")
        content = expect(entry.get("content"), str, f"{at}.content", "a string")
        if any(entry.get(flag) is True for flag in ("lstrip", "rstrip", "single_word")):
            unheeded.append(content)
        yield AddedToken(content, _check_id(entry.get("id"), f"{at}.id"), entry.get("special") is True, at)
    if unheeded:
        shown = ", ".join(repr(content) for content in unheeded[:3]) + (", ..." if len(unheeded) > 3 else "")
        warn(
            f"{where}: {len(unheeded)} added tokens ask for lstrip, rstrip or single_word ({shown}); "
            "llama.cpp takes no account of it, azquant does"
        )


def _unlisted_tokens(
    files: TokenizerFiles, ids: Mapping[str, int], listed: Container[str]
) -> list[AddedToken]:
    """The added tokens that tokenizer.json does not list, by id; transformers adds them when it loads."""
    found: dict[str, AddedToken] = {}
    for token in (*_elsewhere(files), *_named_special(files, ids)):
        if token.content not in listed:
            found.setdefault(token.content, token)
    return sorted(found.values(), key=lambda token: token.id)


def _named_special(files: TokenizerFiles, ids: Mapping[str, int]) -> Iterator[AddedToken]:
    """Tokens of the model that tokenizer_config.json or special_tokens_map.json gives a special role."""
    for name, content in (
        ("tokenizer_config.json", files.config),
        ("special_tokens_map.json", files.special_map),
    ):
        for role in _ROLES:
            text = content.get(f"{role}_token")
            text = text.get("content") if isinstance(text, dict) else text
            if isinstance(text, str) and text in ids:
                yield AddedToken(text, ids[text], True, f"{files.folder / name}: {role}_token")


def _elsewhere(files: TokenizerFiles) -> Iterator[AddedToken]:
    """Added tokens of tokenizer_config.json and added_tokens.json."""
    name = f"{files.folder / 'tokenizer_config.json'}: added_tokens_decoder"
    decoder = files.config.get("added_tokens_decoder")
    for key, entry in expect({} if decoder is None else decoder, dict, name, "an object").items():
        at = f"{name}[{key!r}]"
        expect(entry, dict, at, "an object")
        content = expect(entry.get("content"), str, f"{at}.content", "a string")
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise TokenizerError(f"{at}: the key must be a token id")
        yield AddedToken(content, _check_id(int(key), at), entry.get("special") is True, at)
    special = {value for value in files.config.values() if isinstance(value, str)}
    for content, token_id in files.added.items():
        at = f"{files.folder / 'added_tokens.json'}: {content!r}"
        yield AddedToken(content, _check_id(token_id, at), content in special, at)


def _check_size(by_id: Mapping[int, str], vocab_size: int, where: str) -> None:
    too_high = sorted(token_id for token_id in by_id if token_id >= vocab_size)
    if too_high:
        shown = ", ".join(f"{by_id[token_id]!r} = {token_id}" for token_id in too_high[:3])
        raise ConversionError(
            f"{where} has {max(by_id) + 1} tokens, the model's embedding only {vocab_size} rows "
            f"({len(too_high)} tokens have none: {shown}). Use the tokenizer the model was trained with, "
            "or resize the embedding (model.resize_token_embeddings(len(tokenizer))) and save it again"
        )


def _lay_out(
    by_id: dict[int, str],
    types: dict[int, int],
    ids: dict[str, int],
    extra: list[AddedToken],
    vocab_size: int,
    where: str,
) -> Vocabulary:
    taken = set(by_id.values())
    tokens = []
    for token_id in range(vocab_size):
        text = by_id.get(token_id)
        if text is None:
            text = f"[PAD{token_id}]"
            while text in taken:  # llama.cpp refuses two tokens of one text
                text += "_"
            taken.add(text)
        tokens.append(text)
    try:
        "".join(tokens).encode("utf-8")
    except UnicodeEncodeError as error:
        bad = next(token_id for token_id, text in by_id.items() if not _is_text(text))
        raise TokenizerError(
            f"{where}: the text of token {bad} has a lone surrogate, which is no text"
        ) from error
    kept = {text: token_id for text, token_id in ids.items() if by_id.get(token_id) == text}
    unused = int(TokenType.UNUSED)  # a member of an enumeration takes longer to turn into a number
    return Vocabulary(
        tokens, [int(types.get(token_id, unused)) for token_id in range(vocab_size)], kept, extra
    )


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_merges(model: Mapping[str, Any], ids: Mapping[str, int], where: str) -> list[str]:
    """The merges of a byte-level BPE as GGUF writes them: ``"left right"``, in order of rank.

    Both spellings are read, ``"left right"`` and ``["left", "right"]``. A part with a space in it cannot be
    written (and never applies: byte-level text has no spaces), so such a merge is left out with a warning.
    """
    entries = model.get("merges")
    merges: list[str] = []
    dropped: list[int] = []
    for index, entry in enumerate(
        expect([] if entries is None else entries, list, f"{where}: model.merges", "a list")
    ):
        parts = entry.split(" ") if isinstance(entry, str) else entry
        if not (
            isinstance(parts, list)
            and len(parts) == 2
            and all(isinstance(part, str) and part for part in parts)
        ):
            raise TokenizerError(
                f"{where}: model.merges[{index}] must be 'left right' or ['left', 'right'], found "
                f"{short_repr(entry)}"
            )
        left, right = parts
        for text in (left, right, left + right):
            if text not in ids:
                raise TokenizerError(
                    f"{where}: model.merges[{index}] ({left!r} + {right!r}) needs the token {text!r}, "
                    "which is not in model.vocab. Vocabulary and merges are not of one tokenizer"
                )
        if " " in left or " " in right:
            dropped.append(index)
        else:
            merges.append(f"{left} {right}")
    if dropped:
        warn(
            f"{where}: {len(dropped)} merges have a space in a part (the first is "
            f"model.merges[{dropped[0]}]) and are left out; byte-level text never has spaces, so they "
            "could not apply"
        )
    return merges
