"""Modelfiles, by Ollama's grammar: an instruction and its value on a line, ``#`` begins a comment.

* Instructions in either case: FROM (needed), PARAMETER, TEMPLATE, SYSTEM, ADAPTER, LICENSE, MESSAGE,
  RENDERER, PARSER, REQUIRES, CAPABILITY. DRAFT is known, and refused.
* A value begins after one blank and ends with the line. When it begins with a quotation mark, or with
three, it
  goes on, over lines too, to the first line that ends with as many. Nothing is escaped.
* Characters that do not print are dropped from a line (but tabs, and anything within quotation marks that
is a
  line break, stay). UTF-8, or UTF-16 with its mark.

Source: docs/modelfile of Ollama, and what its parser does where that page is silent.
"""

from __future__ import annotations

import codecs
import re
import warnings
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from azquant.errors import ArgumentError, AzquantWarning, InputFileError, ModelfileError
from azquant.store.parameters import DEPRECATED, parse_parameter

__all__ = ["Message", "Modelfile", "parse_modelfile", "read_modelfile"]

INSTRUCTIONS = frozenset(
    {
        "adapter",
        "capability",
        "draft",
        "from",
        "license",
        "message",
        "parameter",
        "parser",
        "renderer",
        "requires",
        "system",
        "template",
    }
)
ROLES = ("system", "user", "assistant")

_LARGEST = 64 << 20
_VERSION = re.compile(r"v?\d+(\.\d+){0,2}(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?", re.ASCII)
_UTF16 = ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


@dataclass(frozen=True, slots=True)
class Message:
    """A line of the conversation that a model begins with."""

    role: str
    content: str


@dataclass
class Modelfile:
    """What a Modelfile says. Empty texts and lists: it says nothing of them."""

    sources: list[str] = field(default_factory=list)
    """The values of FROM: one, or the parts of a model that is split."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """int, float, bool, or for ``stop`` a list of texts."""
    template: str = ""
    system: str = ""
    adapters: list[str] = field(default_factory=list)
    licenses: list[str] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    renderer: str = ""
    parser: str = ""
    requires: str = ""
    capabilities: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """The text of a Modelfile that says the same."""
        lines = [f"FROM {source}" for source in self.sources]
        for word in ("template", "system", "renderer", "parser", "requires"):
            if value := getattr(self, word):
                lines.append(f"{word.upper()} {_quote(value)}")
        lines += [f"ADAPTER {path}" for path in self.adapters]
        lines += [f"CAPABILITY {name}" for name in self.capabilities]
        for name, value in self.parameters.items():
            for item in value if isinstance(value, list) else [value]:
                text = ("false", "true")[item] if isinstance(item, bool) else str(item)
                quoted = _quote(text) if not isinstance(item, str) or '"' in text else f'"{text}"'
                lines.append(f"PARAMETER {name} {quoted}")
        lines += [f"MESSAGE {message.role} {_quote(message.content)}" for message in self.messages]
        lines += [f"LICENSE {_quote(text)}" for text in self.licenses]
        return "\n".join(lines) + "\n"


def _quote(text: str) -> str:
    """``text`` as a value that reads as the same text again (without what does not print)."""
    if text and "\n" not in text and "\r" not in text and text == text.strip() and text[0] != '"':
        return text
    if not any(line.rstrip().endswith('"""') for line in re.split(r"[\r\n]", text)[:-1]):
        return f'"""{text}"""'
    if not any(line.rstrip().endswith('"') for line in re.split(r"[\r\n]", text)[:-1]):
        return f'"{text}"'
    raise ModelfileError("a Modelfile cannot hold a text with a line that ends with three quotation marks")


def read_modelfile(path: str | PathLike[str]) -> Modelfile:
    """The Modelfile at ``path``. Raises InputFileError, and what :func:`parse_modelfile` raises."""
    path = Path(path)
    try:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "is no file" if path.exists() else "does not exist"
            raise InputFileError(f"{path} {what}; give a Modelfile")
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except InputFileError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputFileError(f"{path} cannot be read: {reason}") from error
    if data.startswith(b"GGUF"):
        raise ModelfileError("this is a GGUF file, no Modelfile; give it without -f", path=path)
    if len(data) > _LARGEST:
        raise ModelfileError("larger than any Modelfile (64 MiB)", path=path)
    encoding = next((name for mark, name in _UTF16 if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ModelfileError(f"not {encoding.upper()} (byte {error.start})", path=path, line=line) from None
    return parse_modelfile(text, path=path)


def parse_modelfile(text: str, *, path: str | PathLike[str] | None = None) -> Modelfile:
    """What ``text`` says; ``path`` is named in errors.

    Raises ModelfileError with the line for what the grammar does not know, an unknown parameter or a value it
    cannot have, and when there is no FROM. A parameter that Ollama dropped is left out with a warning.
    """
    found = Modelfile()
    for line, word, value in _Reader(text, path).instructions():
        try:
            _apply(found, word, value)
        except ArgumentError as error:
            raise ModelfileError(str(error), path=path, line=line) from None
    if not found.sources:
        raise ModelfileError("there is no FROM line, which says what the model is made from", path=path)
    return found


def _apply(found: Modelfile, word: str, value: str) -> None:
    if word.startswith("parameter "):
        _set_parameter(found, word.removeprefix("parameter "), value)
        return
    if word.startswith("message "):
        found.messages.append(Message(word.removeprefix("message "), value))
        return
    if not value and word not in ("template", "system"):
        raise ArgumentError(f"{word.upper()} has no value")
    if word == "draft":
        raise ArgumentError("DRAFT: models with a draft model are not supported")
    if word == "requires" and not _VERSION.fullmatch(value):
        raise ArgumentError(f"REQUIRES {value!r:.80}: write a version such as 0.14.0")
    if word == "requires":
        value = value.removeprefix("v")
    lists = {
        "from": found.sources,
        "adapter": found.adapters,
        "license": found.licenses,
        "capability": found.capabilities,
    }
    if word in lists:
        lists[word].append(value)
    else:
        setattr(found, word, value)


def _set_parameter(found: Modelfile, name: str, text: str) -> None:
    if name in DEPRECATED:
        warnings.warn(f"PARAMETER {name}: Ollama no longer knows it; left out", AzquantWarning, stacklevel=5)
        return
    value = parse_parameter(name, text)
    if isinstance(value, str):
        found.parameters.setdefault(name, []).append(value)
    else:
        found.parameters[name] = value


class _Reader:
    """Goes through the text once."""

    def __init__(self, text: str, path: str | PathLike[str] | None) -> None:
        self._text = text
        self._path = path
        self._at = 0
        self._line = 1

    def instructions(self) -> list[tuple[int, str, str]]:
        """Line, instruction in lower case (with the parameter or role after a blank) and value."""
        found = []
        while self._skip():
            line = self._line
            shown = self._take(r"[A-Za-z]*")
            word = shown.lower()
            if word not in INSTRUCTIONS:
                stray = shown or self._text[self._at]
                known = ", ".join(sorted(INSTRUCTIONS)).upper()
                raise self._error(f"unknown instruction {stray!r:.80}; known are {known}")
            self._take_blank(shown)
            if word == "parameter":
                name = self._take(r"[A-Za-z0-9_]*")
                if not name:
                    raise self._error(
                        "PARAMETER needs one blank, a name of letters, digits and _, and a value"
                    )
                self._take_blank(f"PARAMETER {name}")
                word = f"parameter {name}"
            elif word == "message":
                role = self._take(r"[A-Za-z]*")
                if role not in ROLES:
                    raise self._error(f"MESSAGE: the role {role!r:.80} is none of {', '.join(ROLES)}")
                self._take_blank(f"MESSAGE {role}")
                word = f"message {role}"
            found.append((line, word, self._value(shown)))
        return found

    def _skip(self) -> bool:
        """Past blanks, empty lines and comments; whether anything is left."""
        while True:
            blank = self._take(r"[ \t\r\n]*")
            self._line += _breaks(blank)
            if self._at >= len(self._text):
                return False
            if self._text[self._at] != "#":
                return True
            self._take(r"[^\r\n]*")

    def _take(self, pattern: str) -> str:
        match = re.compile(pattern).match(self._text, self._at)
        if match is None:
            return ""
        self._at = match.end()
        return match[0]

    def _take_blank(self, before: str) -> None:
        if self._text[self._at : self._at + 1] not in (" ", "\t") or self._at >= len(self._text):
            raise self._error(f"{before} has no value; write one after a blank")
        self._at += 1

    def _value(self, word: str) -> str:
        """To the end of the line, or of the line that closes the quotation mark it begins with."""
        line = self._line
        first = _drop_unprintable(self._take(r"[^\r\n]*")).strip()
        mark = '"""' if first.startswith('"""') else '"' if first.startswith('"') else ""
        if not mark:
            return first
        pieces = [first]
        closed = len(first) >= 2 * len(mark) and first.endswith(mark)
        while not closed:
            if self._at >= len(self._text):
                raise self._error(f"{word}: the quotation mark {mark} is never closed", line)
            pieces.append(self._take(r"[\r\n]+"))
            self._line += _breaks(pieces[-1])
            pieces.append(_drop_unprintable(self._take(r"[^\r\n]*")))
            closed = pieces[-1].rstrip().endswith(mark)
        return "".join(pieces).rstrip()[len(mark) : -len(mark)]

    def _error(self, message: str, line: int | None = None) -> ModelfileError:
        return ModelfileError(message, path=self._path, line=self._line if line is None else line)


def _breaks(text: str) -> int:
    return len(re.findall(r"\r\n|\r|\n", text))


def _drop_unprintable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c for c in text if c == "\t" or c.isprintable())
