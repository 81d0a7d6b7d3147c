"""A Modelfile for ``ollama create``, and what its importer would object to.

Sources: docs/modelfile.md and the Modelfile parser of Ollama (an instruction and its value on a line; a value
with line breaks between triple quotes; characters that do not print are dropped).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from azquant.architectures import ARCHITECTURES
from azquant.errors import ArgumentError, AzquantError, ModelError
from azquant.gguf import GGUFFile, keys, open_gguf
from azquant.gguf.atomic import AtomicFile

__all__ = ["check_for_ollama", "modelfile_text", "write_modelfile"]

DEFAULT_TEMPERATURE = 0.8
"""Ollama's own."""

BARE = "{{ .Prompt }}"

# Chat formats: what tells one in a Jinja template, the same as Ollama's (Go) template, and where it stops.
_CHATS: tuple[tuple[tuple[str, ...], str, tuple[str, ...]], ...] = (
    (
        ("<|im_start|>", "<|im_end|>"),
        "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
        "<|im_start|>assistant\n",
        ("<|im_start|>", "<|im_end|>"),
    ),
    (
        ("<|start_header_id|>", "<|eot_id|>"),
        "{{ range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>"
        "{{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    (
        ("<start_of_turn>", "<end_of_turn>"),
        '{{ range .Messages }}<start_of_turn>{{ if eq .Role "assistant" }}model{{ else }}user'
        "{{ end }}\n{{ .Content }}<end_of_turn>\n{{ end }}<start_of_turn>model\n",
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    (
        ("<|user|>", "<|assistant|>", "<|end|>"),
        "{{ range .Messages }}<|{{ .Role }}|>\n{{ .Content }}<|end|>\n{{ end }}<|assistant|>\n",
        ("<|user|>", "<|assistant|>", "<|end|>"),
    ),
    (
        ("[INST]", "[/INST]"),
        '{{ range .Messages }}{{ if eq .Role "assistant" }} {{ .Content }}</s>{{ else }}[INST] '
        "{{ .Content }} [/INST]{{ end }}{{ end }}",
        ("[INST]", "[/INST]"),
    ),
)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool)) else None


def _quoted(text: str) -> str:
    """``text`` as a value of a Modelfile."""
    if '"""' in text:
        raise ModelError("a Modelfile cannot hold three quotation marks in a row")
    return f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'


def _printable(text: str) -> bool:
    return bool(text) and text.isprintable() and '"""' not in text and text == text.strip()


def _context_length(metadata: Mapping[str, Any]) -> int | None:
    value = metadata.get(f"{metadata.get(keys.ARCHITECTURE)}.{keys.CONTEXT_LENGTH}")
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _end_token(metadata: Mapping[str, Any]) -> str | None:
    tokens, eos = metadata.get(keys.TOKENS), metadata.get(keys.EOS_TOKEN_ID)
    if tokens is None or not isinstance(eos, int) or not 0 <= eos < len(tokens):
        return None
    return str(tokens[eos])


def modelfile_text(
    metadata: Mapping[str, Any],
    file_name: str,
    *,
    temperature: float | None = None,
    num_ctx: int | None = None,
) -> str:
    """The Modelfile of a GGUF file with this metadata, which lies beside it as ``file_name``.

    FROM; TEMPLATE: the prompt alone for a base model, Ollama's spelling of the chat format where the file's
    chat template is of a kind known here, else none, with a comment, so that Ollama looks itself; the strings
    that answers stop at; ``num_ctx``: the context length, beyond which models with learned positions end the
    whole process, or less if given; ``temperature``: the file's (general.sampling.temp), or Ollama's default.

    Raises ArgumentError for numbers out of range, ModelError for metadata without a context length.
    """
    length = _context_length(metadata)
    if length is None:
        raise ModelError("GGUF metadata: the context length is missing, so there is no num_ctx to write")
    if num_ctx is not None and not 0 < num_ctx <= length:
        raise ArgumentError(f"num_ctx={num_ctx}: must be from 1 to {length}, the model's context length")
    if temperature is None:
        found = _plain(metadata.get("general.sampling.temp"))
        temperature = DEFAULT_TEMPERATURE if found is None else float(found)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ArgumentError(f"temperature={temperature!r}: must be a finite number >= 0")
    if not file_name.isprintable() or file_name != file_name.strip():
        raise ArgumentError(f"{file_name!r}: a Modelfile cannot name a file with such characters")
    lines = [f"FROM ./{file_name}", ""]
    stops: list[str] = []
    chat = metadata.get(keys.CHAT_TEMPLATE)
    if not isinstance(chat, str) or not chat.strip():
        lines.append(f"TEMPLATE {_quoted(BARE)}")
    else:
        known = next((row for row in _CHATS if all(mark in chat for mark in row[0])), None)
        if known is None:
            lines.append("# The chat template is of no kind that is known here: Ollama looks for one itself.")
        else:
            lines.append(f"TEMPLATE {_quoted(known[1])}")
            stops += known[2]
    end = _end_token(metadata)
    if end is not None and end not in stops:
        stops.append(end)
    lines += ["", *(f"PARAMETER stop {_quoted(stop)}" for stop in stops if _printable(stop))]
    lines += [f"PARAMETER num_ctx {num_ctx or length}", f"PARAMETER temperature {temperature:.6g}"]
    for key, name in (("general.sampling.top_k", "top_k"), ("general.sampling.top_p", "top_p")):
        value = _plain(metadata.get(key))
        if value is not None:
            lines.append(f"PARAMETER {name} {value:.6g}")
    return "\n".join(lines) + "\n"


def write_modelfile(
    gguf: str | PathLike[str],
    path: str | PathLike[str] | None = None,
    *,
    temperature: float | None = None,
    num_ctx: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the Modelfile of the GGUF file ``gguf``, as ``Modelfile`` beside it or at ``path``.

    ``ollama create <name> -f Modelfile`` then makes the model. Raises GGUFError, InputFileError, and what
    :func:`modelfile_text` raises; OutputError when the file is there already, unless ``overwrite``.
    """
    model = Path(gguf)
    target = model.parent / "Modelfile" if path is None else Path(path)
    with open_gguf(model) as file:
        name = model.name if target.parent.resolve() == model.parent.resolve() else str(model.resolve())
        text = modelfile_text(file.metadata, name, temperature=temperature, num_ctx=num_ctx)
    if name != model.name:
        text = text.replace("FROM ./", "FROM ", 1)
    data = text.encode("utf-8")
    with AtomicFile(target, len(data), overwrite=overwrite, sources=(model,)) as output:
        output.write(memoryview(data))
        output.sync()
        output.publish()
    return target


def check_for_ollama(path: str | PathLike[str]) -> list[str]:
    """What ``ollama create`` and ``ollama run`` would stumble over in a GGUF file; empty if nothing is known.

    Each entry names the key or tensor and what goes wrong there. A file that is no GGUF file at all gives one
    entry. Raises InputFileError for one that cannot be read.
    """
    try:
        with open_gguf(path) as file:
            return _problems(file)
    except OSError:
        raise
    except AzquantError as error:
        return [str(error)]


def _problems(file: GGUFFile) -> list[str]:
    metadata: Mapping[str, Any] = file.metadata
    found: list[str] = []
    architecture = metadata.get(keys.ARCHITECTURE)
    if not isinstance(architecture, str):
        return ["general.architecture is missing: Ollama cannot tell what model this is"]
    if file.byte_order != "<":
        found.append("the file is big-endian: Ollama reads little-endian files")
    if len(file.paths) > 1:
        found.append("the model is split over several files: Ollama imports single files only; merge them")
    if _context_length(metadata) is None:
        found.append(f"{architecture}.{keys.CONTEXT_LENGTH} is missing: the runner refuses the model")
    found += _tokenizer_problems(metadata)
    known = ARCHITECTURES.get(architecture)
    if known is None:
        found.append(
            f"architecture {architecture!r:.80} is not known to azquant: its tensors are not checked"
        )
    else:
        try:
            known.check_tensors(known.config.from_gguf(metadata), file.tensors)
        except ModelError as error:
            found.append(str(error))
    for tensor in file.tensors.values():
        if tensor.type.name.startswith("unknown"):
            found.append(f"tensor {tensor.name:.80} has type {tensor.type}, which the runner does not know")
    return found


def _tokenizer_problems(metadata: Mapping[str, Any]) -> list[str]:
    model = metadata.get(keys.TOKENIZER_MODEL)
    if model in (None, "no_vocab"):
        return ["tokenizer.ggml.model is missing or no_vocab: the runner ends as soon as it is given text"]
    found = []
    tokens = metadata.get(keys.TOKENS)
    if tokens is None or not len(tokens):
        return ["tokenizer.ggml.tokens is missing: the runner refuses the model"]
    if model == "gpt2" and not metadata.get(keys.TOKENIZER_PRE):
        found.append("tokenizer.ggml.pre is missing: the runner splits text by a default, and warns")
    twice = [text for text, count in Counter(tokens).items() if count > 1]
    if twice:
        found.append(
            f"tokenizer.ggml.tokens holds {twice[0]!r:.60} more than once: the runner refuses the model"
        )
    if _end_token(metadata) is None:
        found.append("tokenizer.ggml.eos_token_id is missing or no token: answers end only at num_predict")
    return found
