"""A Hugging Face tokenizer folder as GGUF metadata. Needs no ``tokenizers`` package, only JSON.

Two readers are served. llama.cpp gets the keys it knows: tokens, types, merges, and the *name* of a
pre-tokenizer; where that cannot say the same as the tokenizer, a ConversionWarning says what differs.
azquant itself gets the original tokenizer.json in ``tokenizer.huggingface.json`` and so always tokenizes
exactly.

How much the two differ is counted on text (:mod:`azquant.conversion.agreement`), not guessed.

A tokenizer that llama.cpp has no way to run is written as model ``no_vocab`` with its tokens listed:
llama.cpp then loads the file and runs it on ids but refuses text, rather than tokenizing it wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from azquant.conversion._special_ids import added_ends, special_ids
from azquant.conversion._spm_style import (
    SpaceRules,
    bpe_metadata,
    has_all_bytes,
    space_rules,
    unigram_metadata,
)
from azquant.conversion._tokenizer_files import TokenizerFiles, expect, read_tokenizer_files, warn
from azquant.conversion._vocabulary import Vocabulary, read_merges, reconcile
from azquant.conversion.agreement import Agreement, measure_agreement
from azquant.errors import ConversionError, MissingDependencyError, ModelError, TokenizerError
from azquant.gguf import MetadataValue, ValueType, keys
from azquant.gguf.keys import TokenType, array, boolean, string, u32
from azquant.pretokenizer import BYTE_TO_CHAR, match_split

__all__ = ["tokenizer_metadata", "tokenizer_proof"]

_ID_KEYS = {
    "bos": keys.BOS_TOKEN_ID,
    "eos": keys.EOS_TOKEN_ID,
    "unk": keys.UNKNOWN_TOKEN_ID,
    "pad": keys.PADDING_TOKEN_ID,
}
_RETRAIN = (
    "To get a model that llama.cpp and Ollama can tokenize for, train the tokenizer with "
    "`tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)`, `tokenizer.decoder = "
    "decoders.ByteLevel()` and `BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), ...)`, "
    "then train the model again"
)


def tokenizer_metadata(
    path: Path,
    vocab_size: int,
    config: Mapping[str, Any],
    *,
    strict: bool = False,
    corpus: Path | None = None,
) -> dict[str, MetadataValue]:
    """What :func:`tokenizer_proof` gives, without the proof."""
    return tokenizer_proof(path, vocab_size, config, strict=strict, corpus=corpus)[0]


def tokenizer_proof(
    path: Path,
    vocab_size: int,
    config: Mapping[str, Any],
    *,
    strict: bool = False,
    corpus: Path | None = None,
) -> tuple[dict[str, MetadataValue], Agreement | None]:
    """Return the ``tokenizer.*`` metadata of a GGUF file for the tokenizer at ``path``.

    ``path`` is a folder, or one file: what lies beside a tokenizer.json of another name is not read.

    ``vocab_size`` is the number of rows of the embedding: exactly so many tokens are written. ``config`` is
    the parsed config.json. A folder without a tokenizer gives ``tokenizer.ggml.model = "no_vocab"`` and a
    warning.

    With them comes how often llama.cpp's tokens differ from the tokenizer's on ``corpus`` (a UTF-8 file;
    azquant's own sample of many scripts if not given); ``None`` where it has no tokenizer, or where the
    tokenizers package is not installed. ``strict`` refuses what llama.cpp does not tokenize exactly.

    Raises TokenizerError for tokenizer files that are broken (naming file and key), ConversionError when
    the tokenizer has more tokens than ``vocab_size``, InputFileError for a file that cannot be read. Issues
    ConversionWarning for everything that was replaced, left out, or that llama.cpp will do differently.
    """
    if vocab_size < 1:
        raise ConversionError(f"{path}: the model's vocab_size is {vocab_size}; it must be at least 1")
    files = read_tokenizer_files(Path(path))
    folder = files.folder
    if files.tokenizer is None:
        return _no_tokenizer(folder), None
    where = f"{folder / files.name}"
    vocabulary = reconcile(files, vocab_size)
    special = special_ids(files, vocabulary, config)
    add_bos, add_eos = added_ends(files, vocabulary, special)
    rules = space_rules(files.tokenizer, where)
    kind, obstacle = _kind(files.tokenizer, vocabulary, rules, where)
    differences: list[str] = []
    if kind == "gpt2":
        metadata, differences = _byte_level_bpe(files.tokenizer, vocabulary, where)
    elif kind == "llama":
        metadata, differences = bpe_metadata(files.tokenizer, vocabulary, rules, where)
    elif kind == "t5":
        metadata, differences = unigram_metadata(files.tokenizer, vocabulary, rules, where)
    else:
        said = f"{where}: llama.cpp cannot tokenize for this model: {obstacle}"
        if strict:
            raise TokenizerError(f"{said}. {_RETRAIN}")
        warn(f"{said}. azquant runs it exactly. {_RETRAIN}")
        metadata = {keys.TOKENIZER_MODEL: string("no_vocab")}
    if kind in ("llama", "t5") and TokenType.UNKNOWN in vocabulary.types:
        special["unk"] = vocabulary.types.index(TokenType.UNKNOWN)
    if kind and "eos" not in special:
        _warn_of_eos(folder, kind, vocabulary)
    metadata |= {
        keys.TOKENS: array(ValueType.STRING, vocabulary.tokens),
        keys.TOKEN_TYPE: array(ValueType.INT32, vocabulary.types),
    }
    metadata |= {_ID_KEYS[kind]: u32(token_id) for kind, token_id in special.items()}
    metadata[keys.ADD_BOS_TOKEN] = boolean(add_bos)
    metadata[keys.ADD_EOS_TOKEN] = boolean(add_eos)
    metadata |= _chat_templates(files)
    if files.own_special:
        metadata[keys.TOKENIZER_SOURCE] = string("sentencepiece")
    metadata[keys.TOKENIZER_JSON] = string(_carried_json(files, vocabulary))
    return metadata, _prove(where, metadata, differences, strict, corpus) if kind else None


def _prove(
    where: str,
    metadata: Mapping[str, MetadataValue],
    differences: list[str],
    strict: bool,
    corpus: Path | None,
) -> Agreement | None:
    """Count how often llama.cpp will differ; warn of it, or refuse it."""
    agreement: Agreement | None = None
    try:
        agreement = measure_agreement(metadata, corpus)
        measured = str(agreement)
    except MissingDependencyError:
        measured = "how often was not counted: pip install 'azquant[text]'"
        if corpus is not None:
            raise
    except (TokenizerError, ModelError) as error:
        raise TokenizerError(f"{where}: {error}") from error
    if agreement is not None and agreement.wrong_tokens and not differences:
        differences = ["its keys mean the same, and yet the tokens differ"]
    if not differences:
        return agreement
    said = (
        f"{where}: llama.cpp will not tokenize exactly as this tokenizer does: {'; '.join(differences)}. "
        f"Measured: {measured}"
    )
    if strict:
        raise TokenizerError(f"{said}. Nothing was written (strict)")
    nearest = ""
    if metadata[keys.TOKENIZER_MODEL].value == "gpt2":
        name = metadata[keys.TOKENIZER_PRE].value
        nearest = f"The nearest pre-tokenizer llama.cpp has, {name!r}, is written; a"
    warn(
        f"{said}. {nearest or 'A'} model can lose more by it than by quantization. azquant tokenizes exactly"
    )
    return agreement


def _warn_of_eos(folder: Path, kind: str, vocabulary: Vocabulary) -> None:
    assumed = {"gpt2": 11, "llama": 2, "t5": 1}[kind]
    token = vocabulary.tokens[min(assumed, len(vocabulary) - 1)]
    warn(
        f"{folder}: no end-of-text token is known; llama.cpp will take token {assumed} ({token!r}) for "
        "one. Set eos_token in tokenizer_config.json"
    )


def _no_tokenizer(folder: Path) -> dict[str, MetadataValue]:
    others = sorted(folder.glob("*tokenizer*.json"))
    hint = f". If {others[0].name} is it, give it: tokenizer={str(others[0])!r}" if others else ""
    warn(f"{folder} has no tokenizer.json; the file gets no tokenizer and runs on token ids only{hint}")
    return {keys.TOKENIZER_MODEL: string("no_vocab")}


def _kind(
    tokenizer: Mapping[str, Any], vocabulary: Vocabulary, rules: SpaceRules, where: str
) -> tuple[str, str]:
    """llama.cpp's model for this tokenizer (``gpt2``, ``llama``, ``t5``) and ``""``, or ``""`` and why."""
    model = tokenizer["model"]
    kind = _model_type(model)
    if kind == "Unigram":
        obstacle = _unigram_obstacle(model, rules, where)
        return ("", obstacle) if obstacle else ("t5", "")
    if kind != "BPE":
        return "", f"its model is {kind}, and only BPE and Unigram can be written"
    expect(model["vocab"], dict, f"{where}: model.vocab", "an object")
    for key in ("normalizer", "pre_tokenizer"):
        expect(tokenizer.get(key), (dict, type(None)), f"{where}: {key}", "an object or null")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            return "", f"its BPE marks word parts with {key}={model[key]!r}, which llama.cpp's does not"
    steps = _types(tokenizer.get("pre_tokenizer"))
    if steps and steps[-1] == "ByteLevel" and steps.count("ByteLevel") == 1:
        return "gpt2", ""
    if model.get("byte_fallback") is True and rules.escaped:
        if has_all_bytes(vocabulary):
            return "llama", ""
        return "", "its BPE falls back to bytes (byte_fallback), but not every byte has a token <0xXX>"
    if rules.escaped:
        return (
            "",
            "it is a SentencePiece-style BPE without byte_fallback, and llama.cpp needs all byte tokens",
        )
    named = f"pre_tokenizers.{' + '.join(steps)}" if steps else "missing"
    lost = ", which throws the spaces away," if steps and steps[0].startswith("Whitespace") else ""
    return (
        "",
        f"its pre-tokenizer is {named}{lost} where llama.cpp knows byte-level and SentencePiece BPE",
    )


def _unigram_obstacle(model: Mapping[str, Any], rules: SpaceRules, where: str) -> str:
    vocab = expect(model["vocab"], list, f"{where}: model.vocab", "a list")
    unknown = model.get("unk_id")
    if unknown is None:
        return "its Unigram model has no unknown token (unk_id), which llama.cpp needs"
    if isinstance(unknown, bool) or not isinstance(unknown, int) or not 0 <= unknown < len(vocab):
        raise TokenizerError(f"{where}: model.unk_id is {unknown!r:.40}, but there are {len(vocab)} pieces")
    if not rules.escaped:
        return "its Unigram model does not write spaces as U+2581 (Metaspace), which llama.cpp's does"
    return ""


def _model_type(model: Mapping[str, Any]) -> str:
    kind = model.get("type")
    if isinstance(kind, str):
        return kind
    # Files from before 2020 do not name it.
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "BPE" if "merges" in model else "WordPiece"


def _types(node: object) -> list[str]:
    """The step types of a (pre-tokenizer, normalizer) object, in order, Sequences opened."""
    types: list[str] = []
    waiting = [node]
    while waiting:
        step = waiting.pop()
        if isinstance(step, Mapping):
            inner = next((step[key] for key in ("pretokenizers", "normalizers") if key in step), None)
            if isinstance(inner, list):
                waiting.extend(reversed(inner))
            else:
                types.append(str(step.get("type")))
    return types


def _byte_level_bpe(
    tokenizer: Mapping[str, Any], vocabulary: Vocabulary, where: str
) -> tuple[dict[str, MetadataValue], list[str]]:
    """The keys of a byte-level BPE, and each thing that llama.cpp will do otherwise."""
    model = tokenizer["model"]
    merges = read_merges(model, model["vocab"], where)
    ignore_merges: bool | None = model.get("ignore_merges") is True
    match = match_split(tokenizer["pre_tokenizer"], ignore_merges)
    if not match.exact and ignore_merges and _every_token_is_merged(vocabulary, merges):
        match = match_split(tokenizer["pre_tokenizer"], None)
    differences = list(match.differences)
    normalizers = _types(tokenizer.get("normalizer"))
    if normalizers:
        differences.append(f"it normalizes text first ({', '.join(normalizers)}), which llama.cpp does not")
    missing = _missing_bytes(vocabulary)
    if missing and isinstance(model.get("unk_token"), str):
        differences.append(
            f"{missing} bytes have no token and become {model['unk_token']!r}; llama.cpp drops them instead"
        )
    elif missing:
        warn(
            f"{where}: {missing} of the bytes that UTF-8 text is made of have no token; text with them is "
            "lost. Train with initial_alphabet=pre_tokenizers.ByteLevel.alphabet()"
        )
    return {
        keys.TOKENIZER_MODEL: string("gpt2"),
        keys.TOKENIZER_PRE: string(match.name),
        keys.MERGES: array(ValueType.STRING, merges),
    }, differences


def _every_token_is_merged(vocabulary: Vocabulary, merges: list[str]) -> bool:
    """Whether merging each token's characters leads back to it; then ``ignore_merges`` changes nothing."""
    ranks = {tuple(merge.split(" ", 1)): rank for rank, merge in enumerate(merges)}
    never = len(ranks)
    for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        parts = list(text) if kind == TokenType.NORMAL else []
        while len(parts) > 1:
            rank, at = min((ranks.get(pair, never), at) for at, pair in enumerate(pairwise(parts)))
            if rank == never:
                return False
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return True


def _missing_bytes(vocabulary: Vocabulary) -> int:
    """How many of the bytes that occur in UTF-8 text have no token."""
    never_in_utf8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
    return sum(
        char not in vocabulary.ids for byte, char in enumerate(BYTE_TO_CHAR) if byte not in never_in_utf8
    )


def _chat_templates(files: TokenizerFiles) -> dict[str, MetadataValue]:
    """The chat template as it is; of several named ones each, ``default`` under the plain key."""
    where = f"{files.folder}: chat_template"
    template = files.chat_template
    if template is None or template == "":
        return {}
    expect(template, (str, list), where, "a string or a list of named templates")
    if isinstance(template, str):
        return {keys.CHAT_TEMPLATE: string(_text(template, where))}
    named: dict[str, str] = {}
    for index, entry in enumerate(template):
        at = f"{where}[{index}]"
        expect(entry, dict, at, "an object")
        name = expect(entry.get("name"), str, f"{at}.name", "a string")
        named[_text(name, at)] = _text(expect(entry.get("template"), str, f"{at}.template", "a string"), at)
    metadata = {
        keys.CHAT_TEMPLATE + ("" if name == "default" else f".{name}"): string(text)
        for name, text in named.items()
    }
    others = [name for name in named if name != "default"]
    if others:
        metadata["tokenizer.chat_templates"] = array(ValueType.STRING, others)
    return metadata


def _text(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(f"{where} has a lone surrogate, which is no text") from error
    return text


def _carried_json(files: TokenizerFiles, vocabulary: Vocabulary) -> str:
    """tokenizer.json as it is, unless other files know of more added tokens: then with these."""
    if not vocabulary.extra:
        return files.text
    names = ", ".join(repr(token.content) for token in vocabulary.extra[:3])
    warn(
        f"{files.folder / files.name} does not have {len(vocabulary.extra)} added tokens that the files "
        f"beside it have ({names}{', ...' if len(vocabulary.extra) > 3 else ''}); they are added to it"
    )
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    more = [{"id": t.id, "content": t.content, "special": t.special, **flags} for t in vocabulary.extra]
    tokenizer = dict(files.tokenizer or {})
    tokenizer["added_tokens"] = [*(tokenizer.get("added_tokens") or []), *more]
    try:
        return json.dumps(tokenizer)
    except RecursionError as error:
        raise TokenizerError(f"{files.folder / files.name} is nested too deeply") from error
