"""The program that renders one chat template. Run by :mod:`azquant.engine.chat` as a process of its own.

It reads a JSON object from standard input and writes one: ``{"text": ...}`` or ``{"error": ...}``. What a
template could do to the process is bounded twice: by jinja2's sandbox, which keeps it from Python, and by
limits of the operating system, which end loops and growth that no sandbox sees.
"""

from __future__ import annotations

import json
import sys
from typing import Any

__all__ = ["limit_resources"]


def limit_resources(cpu_seconds: int, memory: int) -> None:
    """From here on: so much processor time, so much memory, no files to write to. Nothing on Windows."""
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = int(used.ru_utime + used.ru_stime) + cpu_seconds
    wanted = [(resource.RLIMIT_CPU, cpu), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)]
    if sys.platform == "linux":
        wanted.append((resource.RLIMIT_AS, memory))
    for kind, amount in wanted:
        hard = resource.getrlimit(kind)[1]
        if hard == resource.RLIM_INFINITY or amount < hard:
            resource.setrlimit(kind, (amount, amount))


def render(job: dict[str, Any]) -> str:
    """The template's text. Raises whatever goes wrong."""
    import datetime

    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: object) -> None:
        raise TemplateError(str(message))

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)  # without jinja2's escapes for HTML

    def strftime_now(pattern: str) -> str:
        return datetime.datetime.now().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    template = environment.from_string(job["template"])
    pieces, length = [], 0
    for piece in template.generate(messages=job["messages"], add_generation_prompt=True, **job["special"]):
        length += len(piece)
        if length > job["characters"]:
            raise ValueError(f"it gives more than {job['characters']} characters")
        pieces.append(piece)
    return "".join(pieces)


def main() -> None:
    """Reads the job, renders, answers."""
    job = json.load(sys.stdin)
    sys.path[:] = job["path"]
    import jinja2.ext
    import jinja2.sandbox  # noqa: F401  (before the limits: reading them takes time that is not the template's)

    limit_resources(job["seconds"], job["memory"])
    try:
        answer = {"text": render(job)}
    except MemoryError:
        answer = {"error": f"it needs more than {job['memory'] >> 20} MiB of memory"}
    except RecursionError:
        answer = {"error": "it calls itself without end"}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"[:500]}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
