r"""The named pre-tokenizers of llama.cpp that azquant knows, and how a tokenizer.json is matched to one.

A byte-level BPE splits text before it merges, and GGUF carries only a *name* of that split
(``tokenizer.ggml.pre``); the regular expressions behind the names are compiled into llama.cpp. So a
tokenizer.json can be handed on only when its split means the same as a named one. The match compares
meanings (:func:`split_patterns`, :func:`canonical`), never hashes of sample output.

A split is a tuple of patterns applied one after the other; each cuts every piece into its matches and the
gaps between them, and both are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "BYTE_TO_CHAR",
    "CHAR_TO_BYTE",
    "NAMED",
    "NamedSplit",
    "SplitMatch",
    "canonical",
    "match_split",
    "split_patterns",
]

_PRINTABLE = frozenset((*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)))
_REST = iter(range(0x100, 0x200))

BYTE_TO_CHAR = "".join(chr(byte) if byte in _PRINTABLE else chr(next(_REST)) for byte in range(256))
"""The character that byte-level BPE writes for each byte: itself where printable, else U+0100 and on."""

CHAR_TO_BYTE: Mapping[str, int] = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}

_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL
_QWEN35 = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NO_CONTRACTIONS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL


def _cased(suffix: str, digits: str) -> str:
    """Words cut where a capital follows small letters, as llama.cpp approximates it.

    The originals (GPT-4o's, Mistral's tekken) tell cases apart by \\p{Lu} and \\p{Ll} and take marks into
    words; llama.cpp knows case for A-Z only. So its names never mean the same as such a tokenizer.json.
    """
    start, small, capital = r"[^\r\n\p{L}\p{N}]?", r"(?:(?=[\p{L}])[^A-Z])", r"(?:(?=[\p{L}])[^a-z])"
    return (
        rf"{start}{capital}*{small}+{suffix}|{start}{capital}+{small}*{suffix}|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@dataclass(frozen=True)
class NamedSplit:
    """One row of llama.cpp's table: what ``tokenizer.ggml.pre`` = ``name`` does to text."""

    name: str
    patterns: tuple[str, ...]
    ignore_merges: bool = False
    """A piece that is a token as a whole is taken as it is, without merging."""
    add_bos: bool = False
    """BOS comes first when the file does not say."""
    also: tuple[str, ...] = ()
    """Further names with exactly this meaning; read, never written."""


# Read from llama.cpp's src/llama-vocab.cpp (2026-10). Order matters: the first row that fits is written.
_ROWS = (
    NamedSplit(
        "gpt-2",
        (_GPT2,),
        also=(
            *(
                "phi-2",
                "mpt",
                "olmo",
                "jais",
                "trillion",
                "granite-docling",
                "exaone4",
                "gigachat",
                "a.x-4.0",
            ),
            *("mellum", "modern-bert", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v1-en"),
            *("jina-v2-code", "roberta-bpe"),
        ),
    ),
    NamedSplit(
        "llama-bpe",
        (_LLAMA3,),
        ignore_merges=True,
        add_bos=True,
        also=("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    ),
    NamedSplit("dbrx", (_LLAMA3,), also=("smaug-bpe", "glm4", "chatglm-bpe")),
    NamedSplit(
        "qwen2",
        (_QWEN2,),
        also=(
            *(
                "stablelm2",
                "deepseek-r1-qwen",
                "megrez",
                "hunyuan",
                "solar-open",
                "grok-2",
                "kormo",
                "f2llmv2",
            ),
            *("bailingmoe", "bailingmoe2", "llada-moe"),
        ),
    ),
    NamedSplit("qwen35", (_QWEN35,)),
    NamedSplit(
        "smollm",
        (r"\p{N}", _GPT2),
        also=("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    ),
    NamedSplit("ufakzeka", (_NO_CONTRACTIONS,)),
    NamedSplit("gpt-4o", (_cased(_CONTRACTIONS + "?", r"\p{N}{1,3}"),), also=("llama4", "kanana2", "talkie")),
    NamedSplit("tekken", (_cased("", r"\p{N}"),), ignore_merges=True, add_bos=True),
    NamedSplit(
        "default",
        (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    ),
    NamedSplit("falcon", (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
)

NAMED: Mapping[str, NamedSplit] = {name: row for row in _ROWS for name in (row.name, *row.also)}
"""Every name that can be read, with what it means."""

# Spellings of one meaning, each replaced by the spelling used above. A possessive quantifier equals the
# greedy one where what follows cannot match what it took; `\s*[\r\n]` already reaches the last line break
# of its run, and `|\s+` at the end only names what would be a gap anyway.
_SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", _CONTRACTIONS),
    ("'(?i:[sdmt]|ll|ve|re)", _CONTRACTIONS),
    ("'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])", _CONTRACTIONS),
    (r"[^\r\n\p{L}\p{N}]?+\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+"),
    (r"[^\s\p{L}\p{N}]++[\r\n]*", r"[^\s\p{L}\p{N}]+[\r\n]*"),
    (r"\p{N}{1}", r"\p{N}"),
    (r"|\s*[\r\n]|", r"|\s*[\r\n]+|"),
)
_NO_LAST_GAP = r"|\s+(?!\S)"

# These patterns leave no gaps, so keeping only their matches (tiktoken's way) is the same split.
_COVERING = frozenset({_GPT2, _LLAMA3, _QWEN2, _QWEN35, _NO_CONTRACTIONS})


@dataclass(frozen=True)
class SplitMatch:
    """The row to write and, when it is not exact, each way in which it differs from the tokenizer."""

    name: str
    differences: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether llama.cpp splits exactly as the tokenizer does."""
        return not self.differences


def canonical(pattern: str) -> str:
    """Return ``pattern`` in the spelling of this module's table where it is a known spelling of the same."""
    for spelling, ours in _SPELLINGS:
        pattern = pattern.replace(spelling, ours)
    return pattern + r"|\s+" if pattern.endswith(_NO_LAST_GAP) else pattern


def split_patterns(pre_tokenizer: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Read the ``pre_tokenizer`` object of a tokenizer.json that ends in ByteLevel.

    Returns its patterns (canonical) and the parts of it that no pattern expresses, each as a phrase.
    """
    patterns: list[str] = []
    differences: list[str] = []
    for step in _steps(pre_tokenizer):
        kind = step.get("type")
        if kind == "ByteLevel":
            if step.get("add_prefix_space", True):
                differences.append("ByteLevel(add_prefix_space=True) puts a space before the text")
            if step.get("use_regex", True):
                patterns.append(_GPT2)
        elif kind == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits", False) else r"\p{N}+")
        elif kind == "Split":
            _read_split(step, patterns, differences)
        else:
            differences.append(f"it has a {kind} step")
    return tuple(patterns), tuple(differences)


def match_split(pre_tokenizer: Mapping[str, Any], ignore_merges: bool | None) -> SplitMatch:
    """Find the name whose split means the same as ``pre_tokenizer``, or the nearest one and what differs.

    ``ignore_merges`` is the flag of the BPE model; ``None`` says that it makes no difference for this
    vocabulary (each token is what its own merges lead to).
    """
    patterns, differences = split_patterns(pre_tokenizer)
    rows = [row for row in _ROWS if row.patterns == patterns]
    agreeing = [row for row in rows if ignore_merges is None or row.ignore_merges == ignore_merges]
    if agreeing:
        return SplitMatch(agreeing[0].name, differences)
    if rows:
        why = f"the model says ignore_merges={ignore_merges}, the name {rows[0].name!r} means the opposite"
        return SplitMatch(rows[0].name, (*differences, why))
    if patterns:
        why = "its split is " + " then ".join(repr(pattern) for pattern in patterns)
    else:
        why = "it does not split the text at all (ByteLevel(use_regex=False) alone)"
    return SplitMatch(_nearest(patterns), (*differences, why))


def _steps(pre_tokenizer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The steps of a pre-tokenizer, Sequences opened (without recursion: they nest as deep as JSON does)."""
    steps: list[Mapping[str, Any]] = []
    waiting: list[Any] = [pre_tokenizer]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, Mapping):
            continue
        inner = node.get("pretokenizers")
        if node.get("type") == "Sequence" and isinstance(inner, list):
            waiting.extend(reversed(inner))
        else:
            steps.append(node)
    return steps


def _read_split(step: Mapping[str, Any], patterns: list[str], differences: list[str]) -> None:
    pattern = step.get("pattern")
    if isinstance(pattern, Mapping) and isinstance(pattern.get("String"), str):
        literal = pattern["String"]
        said = f"it has a Split at the literal text {literal!r}"
        if canonical(literal) in _COVERING or "\\p{" in literal:
            said += " (a regular expression must be given as tokenizers.Regex(...), or it never matches)"
        differences.append(said)
        return
    regex = pattern.get("Regex") if isinstance(pattern, Mapping) else None
    if not isinstance(regex, str):
        differences.append("it has a Split without a pattern")
        return
    ours = canonical(regex)
    behavior, invert = step.get("behavior"), bool(step.get("invert", False))
    kept = behavior == "Isolated" or (behavior == "Removed" and invert and ours in _COVERING)
    if not kept:
        differences.append(f"it has a Split with behavior={behavior!r}, invert={invert}")
    patterns.append(ours)


def _nearest(patterns: tuple[str, ...]) -> str:
    joined = "|".join(patterns)
    if r"\p{Lu}" in joined:
        return "gpt-4o" if r"\p{N}{1,3}" in joined else "tekken"
    if r"\p{N}{1,3}" in joined:
        return "dbrx"
    if r"[^\r\n\p{L}\p{N}]?" in joined:
        return "qwen2"
    return "smollm" if patterns[:1] == (r"\p{N}",) else "gpt-2"
