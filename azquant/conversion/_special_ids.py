"""Which token ends a text, begins one, is unknown, is padding: several files say so, and they disagree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from azquant.conversion._tokenizer_files import TokenizerFiles, expect, warn
from azquant.conversion._vocabulary import Vocabulary
from azquant.errors import TokenizerError
from azquant.gguf.keys import TokenType

__all__ = ["added_ends", "special_ids"]

# The names people give these tokens; looked for only when no file names one.
_WELL_KNOWN = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "<|bos|>", "<|endoftext|>"),
    "eos": ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[EOS]", "<|eos|>", "<|im_end|>", "[SEP]"),
    "unk": (),
    "pad": (),
}


@dataclass(frozen=True)
class _Claim:
    """What one file says an id is: ``ids`` has more than one where the file gives a list."""

    where: str
    ids: tuple[int, ...]


def special_ids(files: TokenizerFiles, vocabulary: Vocabulary, config: Mapping[str, Any]) -> dict[str, int]:
    """Settle ``bos``, ``eos``, ``unk`` and ``pad``; a kind that no file knows is absent.

    The tokenizer's own files, which give tokens by text, count before the numbers in config.json and
    generation_config.json: transformers writes 50256 there for every GPT2Config that was not told
    otherwise. A number outside the vocabulary is never used. Each number that is overruled is named in a
    ConversionWarning.
    """
    return {
        kind: token_id
        for kind in _WELL_KNOWN
        if (token_id := _settle(kind, files, vocabulary, config)) is not None
    }


def _settle(
    kind: str, files: TokenizerFiles, vocabulary: Vocabulary, config: Mapping[str, Any]
) -> int | None:
    size = len(vocabulary)
    claims = list(_numbers(kind, files, config))
    chosen, source = _named(kind, files, vocabulary)
    if chosen is None:
        usable = [token_id for claim in claims for token_id in claim.ids if token_id < size]
        known = _well_known(kind, vocabulary)
        if usable and (known is None or vocabulary.types[usable[0]] == TokenType.CONTROL):
            chosen, source = usable[0], "the config"
            if kind in ("bos", "eos") and vocabulary.types[chosen] != TokenType.CONTROL:
                where = next(claim.where for claim in claims if chosen in claim.ids)
                warn(
                    f"{where} is {chosen}, which is {_what(vocabulary, chosen)} and no special "
                    f"token; it is used because no tokenizer file names a {kind}_token"
                )
        elif known is not None:
            chosen, source = known, "its name"
    for claim in claims:
        if chosen in claim.ids:
            continue
        wrong = claim.ids[0]
        found = f"{claim.where} is {wrong}"
        found += (
            f", but the vocabulary has {size} entries" if wrong >= size else f" ({_what(vocabulary, wrong)})"
        )
        if chosen is None:
            warn(f"{found}; no tokenizer file names a {kind}_token, so it is left out")
        else:
            warn(f"{found}; {chosen} ({vocabulary.tokens[chosen]!r}, by {source}) is written instead")
    return chosen


def _what(vocabulary: Vocabulary, token_id: int) -> str:
    unused = vocabulary.types[token_id] == TokenType.UNUSED
    return "an unused row" if unused else f"the token {vocabulary.tokens[token_id]!r}"


def _numbers(kind: str, files: TokenizerFiles, config: Mapping[str, Any]) -> Iterator[_Claim]:
    """The ids that config.json and generation_config.json give; the same claim of both is one."""
    key = f"{kind}_token_id"
    said: dict[tuple[int, ...], list[str]] = {}
    for name, content in (("config.json", config), ("generation_config.json", files.generation)):
        value = content.get(key)
        values = [value] if isinstance(value, int) and not isinstance(value, bool) else value
        where = f"{files.folder / name}: {key}"
        ids = tuple(
            expect(entry, int, where, "a token id or a list of them")
            for entry in expect([] if values is None else values, list, where, "a token id or a list of them")
        )
        ids = tuple(token_id for token_id in ids if token_id >= 0)  # -1 is an old way to say: none
        if ids:
            said.setdefault(ids, []).append(name)
    for ids, names in said.items():
        yield _Claim(f"{files.folder}: {key} in {' and '.join(names)}", ids)


def _named(kind: str, files: TokenizerFiles, vocabulary: Vocabulary) -> tuple[int | None, str]:
    """The token that tokenizer_config.json or special_tokens_map.json gives by text."""
    key = f"{kind}_token"
    for name, content in (
        ("tokenizer_config.json", files.config),
        ("special_tokens_map.json", files.special_map),
    ):
        where = f"{files.folder / name}: {key}"
        text = token_text(content.get(key), where)
        if text is None:
            continue
        if text in vocabulary.ids:
            return vocabulary.ids[text], name
        warn(f"{where} is {text!r}, which is no token of {files.name}")
    own = files.own_special.get(kind)
    return (None, "") if own is None else (vocabulary.ids.get(own), files.name)


def token_text(value: object, where: str) -> str | None:
    """The text of a token given as a string or as an AddedToken object; ``None`` when not given."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is None or value == "":
        return None
    text: str = expect(value, str, where, "a token (a string)")
    return text


def _well_known(kind: str, vocabulary: Vocabulary) -> int | None:
    for text in _WELL_KNOWN[kind]:
        token_id = vocabulary.ids.get(text)
        if token_id is not None:
            return token_id
    return None


def added_ends(
    files: TokenizerFiles, vocabulary: Vocabulary, special: Mapping[str, int]
) -> tuple[bool, bool]:
    """Whether BOS is put before each text and EOS after it.

    As in transformers, ``add_bos_token`` / ``add_eos_token`` of tokenizer_config.json decide where given,
    else the post-processor of tokenizer.json. Warns of what a pair of flags cannot say.
    """
    where = f"{files.folder / files.name}: post_processor"
    first, last, rest = _template_ends((files.tokenizer or {}).get("post_processor"), where)
    result = []
    for kind, text in (("bos", first), ("eos", last)):
        token_id = vocabulary.ids.get(text) if text is not None else None
        if text is not None and token_id != special.get(kind):
            rest.append(f"{text!r}, which is not the {kind}_token,")
            text = None
        flag = files.config.get(f"add_{kind}_token")
        said = text is not None
        if isinstance(flag, bool) and flag != said:
            if (files.tokenizer or {}).get("post_processor") is not None and said:
                warn(
                    f"{files.folder / 'tokenizer_config.json'}: add_{kind}_token is {flag}, but {where} "
                    "adds it; tokenizer_config.json counts, as in transformers"
                )
            said = flag
        if said and kind not in special:
            warn(f"{files.folder}: add_{kind}_token is set, but there is no {kind}_token; none will be added")
            said = False
        result.append(said)
    if rest:
        warn(
            f"{where} adds {' and '.join(rest)} to each text; GGUF cannot say so, and neither azquant nor "
            "llama.cpp does it"
        )
    return result[0], result[1]


def _template_ends(post_processor: object, where: str) -> tuple[str | None, str | None, list[str]]:
    """First and last special token that a post-processor adds, and what else it adds."""
    first: str | None = None
    last: str | None = None
    rest: list[str] = []
    waiting: list[object] = [] if post_processor is None else [post_processor]
    while waiting:
        node = expect(waiting.pop(), dict, where, "an object")
        kind = node.get("type")
        if kind == "Sequence":
            waiting.extend(reversed(expect(node.get("processors"), list, f"{where}.processors", "a list")))
        elif kind in ("RobertaProcessing", "BertProcessing"):
            first, last = (_pair_text(node.get(key), f"{where}.{key}") for key in ("cls", "sep"))
        elif kind == "TemplateProcessing":
            before, after = _template_sides(node.get("single"), f"{where}.single")
            first, last = (before[-1] if before else None), (after[0] if after else None)
            rest += [repr(text) for text in (*before[:-1], *after[1:])]
    return first, last, rest


def _template_sides(template: object, where: str) -> tuple[list[str], list[str]]:
    before: list[str] = []
    after: list[str] = []
    side = before
    for index, piece in enumerate(expect(template, list, where, "a list")):
        expect(piece, dict, f"{where}[{index}]", "an object")
        if "Sequence" in piece:
            side = after
        elif "SpecialToken" in piece:
            token = expect(piece["SpecialToken"], dict, f"{where}[{index}].SpecialToken", "an object")
            side.append(expect(token.get("id"), str, f"{where}[{index}].SpecialToken.id", "a string"))
    return before, after


def _pair_text(value: object, where: str) -> str:
    pair = expect(value, list, where, "a [token, id] pair")
    if not pair:
        raise TokenizerError(f"{where} must be a [token, id] pair, found []")
    text: str = expect(pair[0], str, f"{where}[0]", "a string")
    return text
