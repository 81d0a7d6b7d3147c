"""Runs one thing with one hostile input, and judges how it ends. A child process for each, forked from here.

The promise: an exception of azquant's own or a valid result, under two seconds of processor time, within
the input's size and 200 MB of memory, nothing written but whole outputs. A crash, a hang, running out of
the memory limit and any other exception break it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "judge", "run_actions"]

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 2.0
WALL_SECONDS = 30
MEMORY = 200_000_000


def judge(action: Callable[[], Any], size: int) -> str:
    """Runs ``action`` in a fork; ``"ok"``, ``"refused: ..."`` or what is wrong, which begins with a "!"."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.write(writing, _in_child(action, size).encode("utf-8", "backslashreplace")[:60_000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    _, status, usage = os.wait4(child, 0)
    if os.WIFSIGNALED(status):
        return f"!ended by {signal.Signals(os.WTERMSIG(status)).name}"
    spent = usage.ru_utime + usage.ru_stime
    if spent > SECONDS:
        return f"!took {spent:.1f} s of processor time ({said})"
    return said or "!said nothing"


def _in_child(action: Callable[[], Any], size: int) -> str:
    from azquant.errors import AzquantError

    signal.alarm(WALL_SECONDS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    # Twice the size: mapping the file takes address space, though no memory.
    limit = now + 2 * size + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        action()
    except AzquantError as error:
        return f"refused: {type(error).__name__}: {str(error)[:500]}"
    except BaseException as error:
        return f"!{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}"
    return "ok"


def _actions(path: Path, out: Path) -> dict[str, Callable[[], Any]]:
    """What can be done with ``path``; whatever is written goes into ``out``."""
    import click.testing

    import azquant
    from azquant.cli import cli
    from azquant.evaluate import verify
    from azquant.gguf import GGUFArray, edit_gguf, keys, merge_gguf, open_gguf, split_gguf

    def read() -> None:
        with open_gguf(path) as file:
            for value in file.metadata.values():
                if isinstance(value, GGUFArray):
                    value.tolist()
            file.copy_metadata()
            for tensor in file.tensors.values():
                if file.has_data:
                    assert tensor.raw.size == tensor.nbytes

    def command(*arguments: str) -> Callable[[], None]:
        def run() -> None:
            from azquant.errors import AzquantError

            runner = click.testing.CliRunner()
            result = runner.invoke(cli, [str(argument) for argument in arguments], catch_exceptions=True)
            if result.exit_code not in (0, 2):
                raise RuntimeError(
                    f"exit code {result.exit_code}: {result.output[-500:]}{result.exception!r}"
                )
            if result.exit_code and "azquant: " not in result.output:
                raise RuntimeError(f"no message: {result.output[-300:]}")
            if result.exit_code:
                raise AzquantError(result.output[-200:])

        return run

    everything: dict[str, Callable[[], Any]] = {
        "open": read,
        "inspect": command("inspect", str(path), "--json", "--full", "--hash"),
        "inspect table": command("inspect", str(path)),
        "verify": lambda: verify(path, hashes=True),
        "verify against itself": lambda: verify(path, path),
        "edit": lambda: edit_gguf(path, out / "edited.gguf", values={"x.y": keys.u8(1)}),
        "split": lambda: split_gguf(path, out / "cut", max_tensors=1 << 16),
        "merge": lambda: merge_gguf(path, out / "merged.gguf"),
        "convert": lambda: azquant.convert(path, out / "converted.gguf"),
        "quantize": lambda: azquant.quantize_file(
            path, out / "quantized.gguf", "q4_0", allow_requantize=True
        ),
        "load": lambda: azquant.load(path),
        "verify against": lambda: verify(out.parent / "good.gguf", path),
    }
    return everything


def main() -> None:
    """Reads {"names": [...], "paths": [...], "out": ...} from stdin; a line of JSON for each outcome."""
    import warnings

    warnings.simplefilter("ignore")
    request = json.load(sys.stdin)
    out = Path(request["out"])
    _warm_up(out)
    for text in request["paths"]:
        path = Path(text)
        size = path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*"))
        for name in request["names"]:
            outcome = judge(_actions(path, out)[name], size)
            left = sorted(p.name for p in out.iterdir())
            for item in out.iterdir():
                item.unlink()
            print(json.dumps({"path": text, "action": name, "outcome": outcome, "left": left}), flush=True)


def _warm_up(out: Path) -> None:
    """Import everything once, before the forks, without starting a thread."""
    import azquant
    import azquant.conversion
    import azquant.engine.model
    import azquant.evaluate
    from azquant._backend import kernels
    from azquant.cli import cli

    kernels()
    azquant.set_num_threads(1)
    assert cli


def run_actions(names: Iterable[str], paths: Iterable[Path], out: Path) -> list[dict[str, Any]]:
    """Every action with every path, in a process that forks for each: what they gave."""
    out.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve())],
        input=json.dumps({"names": list(names), "paths": [str(p) for p in paths], "out": str(out)}),
        env=os.environ | {"PYTHONPATH": str(ROOT), "AZQUANT_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return [json.loads(line) for line in done.stdout.splitlines()]


if __name__ == "__main__":
    main()
