"""Chat templates: jinja2 programs that come with a model file, and are trusted with nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from azquant.errors import ArgumentError, MissingDependencyError, ModelError

__all__ = ["render_chat"]

CPU_SECONDS = 1
WALL_SECONDS = 10.0
"""Long enough for a machine that is busy; what a template computes is bounded by CPU_SECONDS."""
MEMORY = 512 << 20
CHARACTERS = 4 << 20


def render_chat(template: str, messages: Sequence[Mapping[str, Any]], special: Mapping[str, str]) -> str:
    """The text of a conversation; ``special`` are further variables of the template (``bos_token``, ...).

    The template runs in jinja2's ImmutableSandboxedEnvironment, as transformers runs it, in a process of its
    own that is ended after CPU_SECONDS of work, MEMORY bytes or CHARACTERS of output.

    Raises ArgumentError, ModelError, MissingDependencyError.
    """
    import subprocess  # a few milliseconds that only chats pay

    checked = _check_messages(messages)
    if importlib.util.find_spec("jinja2") is None:
        raise MissingDependencyError("chat needs the package jinja2: pip install 'azquant[text]'")
    if not sys.executable or getattr(sys, "frozen", False):
        raise ModelError("chat templates need a Python interpreter to run in; this program brings none along")
    job = {
        "template": template,
        "messages": checked,
        "special": dict(special),
        "path": [entry for entry in sys.path if entry],
        "seconds": CPU_SECONDS,
        "memory": MEMORY,
        "characters": CHARACTERS,
    }
    program = Path(__file__).with_name("_chat_process.py")
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(program)],
            input=json.dumps(job).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ModelError(f"the file's chat template was not done after {WALL_SECONDS:g} s") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise ModelError(
            f"the file's chat template was ended: it works for more than {CPU_SECONDS} s or needs more than "
            f"{MEMORY >> 20} MiB of memory"
        ) from None
    if "error" in answer:
        raise ModelError(f"the file's chat template fails on these messages: {answer['error']}")
    text: str = answer["text"]
    return text


def _check_messages(messages: Any) -> list[dict[str, Any]]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ArgumentError('messages must be a list of {"role": ..., "content": ...}, at least one')
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ArgumentError(
                f'message {i} must be a mapping with a "role" that is a string: {message!r:.80}'
            )
        if not isinstance(message.get("content", ""), (str, list, type(None))):
            raise ArgumentError(f'message {i}: "content" must be a string')
        checked.append(dict(message))
    try:
        json.dumps(checked, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"messages must hold plain values only: {error}") from None
    return checked
