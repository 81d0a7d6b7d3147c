"""Whether a well-formed file also makes sense: its metadata, its vocabulary, its layout."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from azquant.architectures import ARCHITECTURES
from azquant.errors import ModelError
from azquant.gguf import GGUFArray, GGUFFile, ValueType, keys

__all__ = ["Findings", "check_file"]

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Findings:
    """Problems and notes, the same one at most so many times: a hostile file may have 131072 tensors."""

    MOST = 1000

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []

    def problem(self, text: str) -> None:
        if len(self.problems) < self.MOST:
            self.problems.append(text)
        elif len(self.problems) == self.MOST:
            self.problems.append("... and more")

    def note(self, text: str) -> None:
        self.notes.append(text)


def check_file(file: GGUFFile, findings: Findings) -> None:
    """Everything about a file that is not about a single tensor's numbers."""
    if not file.has_data:
        findings.problem("the file is a header only: its tensors have no data")
    _check_texts(file, findings)
    _check_model(file, findings)
    _check_vocabulary(file, findings)
    if len(file.paths) == 1:
        _check_layout(file, findings)


def _check_texts(file: GGUFFile, findings: Findings) -> None:
    """Strings that are no UTF-8: legal bytes to pass on, but other readers stumble over them."""
    for key, value in file.metadata.items():
        texts: Iterable[Any] = (value,) if isinstance(value, str) else ()
        if isinstance(value, GGUFArray) and value.element_type.name == "STRING":
            texts = value.tolist()
        broken = sum(not _is_utf8(text) for text in texts)
        if broken:
            findings.note(f"key {key[:80]!r} holds {broken} text{'s' * (broken > 1)} that are not UTF-8")


def _is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_model(file: GGUFFile, findings: Findings) -> None:
    """That the tensors are those which the metadata promise."""
    name = file.metadata.get("general.architecture")
    architecture = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if architecture is None:
        what = "not named" if name is None else f"{str(name)[:80]!r}, which azquant does not know"
        findings.note(f"the architecture is {what}: whether all tensors are there was not checked")
        return
    if not file.tensors:
        findings.note("the file has metadata only (a vocabulary): there are no tensors to check")
        return
    try:
        architecture.check_tensors(architecture.config.from_gguf(file.metadata), file.tensors)
    except ModelError as error:
        findings.problem(str(error))


def _check_layout(file: GGUFFile, findings: Findings) -> None:
    """Bytes that belong to nothing: legal, and sometimes a sign that a file was put together wrongly."""
    end, gaps = file.data_offset, 0
    for tensor in sorted(file.tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.nbytes:
            gaps += max(0, tensor.offset - end)
            end = tensor.offset + tensor.nbytes + -tensor.nbytes % file.alignment
    if gaps:
        findings.note(f"{gaps} bytes between tensors belong to none")
    if file.tensors and file.size > max(end, file.data_offset):
        findings.note(f"{file.size - end} bytes after the last tensor belong to none")


def _check_vocabulary(file: GGUFFile, findings: Findings) -> None:
    """That the token ids, the lists beside the tokens and the embedding agree with the tokens."""
    tokens = file.metadata.get(keys.TOKENS)
    if not isinstance(tokens, GGUFArray) or tokens.element_type is not ValueType.STRING:
        return
    count = len(tokens)
    for key, value in file.metadata.items():
        if (
            key.startswith("tokenizer.ggml.")
            and key.endswith("_token_id")
            and isinstance(value, int)
            and not 0 <= value < count
        ):
            findings.problem(f"{key[:80]} is {value}; the vocabulary has the tokens 0 to {count - 1}")
    for key in (keys.SCORES, keys.TOKEN_TYPE):
        beside = file.metadata.get(key)
        if isinstance(beside, GGUFArray) and len(beside) != count:
            findings.problem(f"{key} has {len(beside)} items for {count} tokens")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None and len(embedding.shape) == 2 and embedding.shape[0] != count:
        findings.problem(f"token_embd.weight has {embedding.shape[0]} rows for {count} tokens")
    kinds = file.metadata.get(keys.TOKEN_TYPE)
    if isinstance(kinds, GGUFArray) and kinds.element_type is ValueType.INT32 and len(kinds) == count:
        for index in (kinds.to_numpy() == keys.TokenType.BYTE).nonzero()[0][:1000]:
            text = tokens[int(index)]
            if not _BYTE.fullmatch(text):
                findings.problem(f"token {index} is a byte, but its text {text[:20]!r} is not like <0x0A>")
