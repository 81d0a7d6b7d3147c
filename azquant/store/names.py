"""Names of models: ``[host/][namespace/]model[:tag]``, as Ollama reads them.

Every part becomes a folder or file name of the store, so its characters are few: letters, digits, ``_``,
``-`` and ``.``, beginning with a letter, digit or ``_``. What is left out is filled in as Ollama does:
``registry.ollama.ai/library/<model>:latest``.

Source: docs/modelfile and the package types/model of Ollama.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from azquant.errors import ArgumentError

__all__ = ["ModelName"]

DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}", re.ASCII)
_NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}", re.ASCII)
# Device names of Windows: such a file cannot be made there, and a store is meant to be carried around.
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.ASCII | re.IGNORECASE)
_LONGEST = 1000


@dataclass(frozen=True, slots=True, order=True)
class ModelName:
    """A full name. Made by :meth:`parse`, which checks every part."""

    host: str
    namespace: str
    model: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> ModelName:
        """The name that ``text`` stands for. Raises ArgumentError, which says what is wrong with it."""
        if not isinstance(text, str) or not text:
            raise ArgumentError("a model's name is empty; write NAME or NAME:TAG")
        if len(text) > _LONGEST:
            raise ArgumentError(f"the model name {text[:40]!r}… is too long ({len(text)} characters)")
        rest = text
        for scheme in ("https://", "http://"):
            rest = rest.removeprefix(scheme)
        if "@" in rest:
            raise ArgumentError(f"model name {text!r}: a digest (@) does not belong in the name of a model")
        host, namespace, tag = DEFAULT_HOST, DEFAULT_NAMESPACE, DEFAULT_TAG
        folder, slash, last = rest.rpartition("/")
        if ":" in last:
            last, _, tag = last.partition(":")
        if slash:
            before, slash, namespace = folder.rpartition("/")
            if slash:
                host = before
        parts = (("host", host), ("namespace", namespace), ("model", last), ("tag", tag))
        for kind, part in parts:
            _check(text, kind, part)
        return cls(host, namespace, last, tag)

    def __str__(self) -> str:
        """The shortest text that means this name; the tag is always in it."""
        short = f"{self.model}:{self.tag}"
        if self.host.lower() != DEFAULT_HOST:
            return f"{self.host}/{self.namespace}/{short}"
        return short if self.namespace.lower() == DEFAULT_NAMESPACE else f"{self.namespace}/{short}"

    @property
    def parts(self) -> tuple[str, str, str, str]:
        """Host, namespace, model and tag: the folders of its manifest, and the file."""
        return self.host, self.namespace, self.model, self.tag

    def matches(self, other: ModelName) -> bool:
        """Whether both are the same model; letters count the same in either case."""
        return [part.lower() for part in self.parts] == [part.lower() for part in other.parts]


def _check(text: str, kind: str, part: str) -> None:
    pattern = {"host": _HOST, "namespace": _NAMESPACE}.get(kind, _PART)
    if not pattern.fullmatch(part):
        shown = part if len(part) <= 40 else part[:40] + "…"
        dot = "" if kind == "namespace" else " ."
        longest = 350 if kind == "host" else 80
        raise ArgumentError(
            f"model name {text[:80]!r}: the {kind} {shown!r} may have 1 to {longest} of the characters "
            f"a-z A-Z 0-9 _ -{dot} and begins with a letter, digit or _"
        )
    if _RESERVED.fullmatch(part) or part.endswith("."):
        raise ArgumentError(f"model name {text!r}: the {kind} {part!r} is no file name on every system")
