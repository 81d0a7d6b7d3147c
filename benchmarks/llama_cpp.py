"""llama.cpp's programs, as build_peers.sh makes them: how fast they run a model, and in how much memory."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LlamaCpp:
    """Programs in ``folder``; ``kernels`` holds another libggml-cpu.so for them (an AVX2 build's)."""

    folder: Path
    threads: int
    kernels: Path | None = None

    def _run(self, program: str, *arguments: object) -> tuple[float, int, str]:
        """Seconds, peak resident bytes and output of a program."""
        environment = dict(os.environ)
        if self.kernels is not None:
            environment["LD_LIBRARY_PATH"] = str(self.kernels)
        command = [str(self.folder / program), *map(str, arguments)]
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as problems:
            start = time.perf_counter()
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=problems, env=environment
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = status
            seconds = time.perf_counter() - start
            for stream in (out, problems):
                stream.seek(0)
            text, said = (stream.read().decode(errors="replace") for stream in (out, problems))
        if status:
            raise SystemExit(f"{' '.join(command)} ended with status {status}:\n{said[-2000:]}")
        return seconds, usage.ru_maxrss * 1024, text

    def bench(self, model: Path, prompt: int, answer: int) -> tuple[dict[str, float], int]:
        """llama-bench: {"prefill", "decode"} in tokens/s (0 tokens: left out), and its peak memory."""
        arguments = ["-m", model, "-t", self.threads, "-p", prompt, "-n", answer, "-r", 1, "-o", "json"]
        _, peak, text = self._run("llama-bench", *arguments)
        runs: list[dict[str, Any]] = json.loads(text[text.index("[") :])
        return {("prefill" if run["n_prompt"] else "decode"): run["avg_ts"] for run in runs}, peak

    def at_depths(self, model: Path, depths: list[int], answer: int) -> dict[int, float]:
        """llama-bench: tokens/s of ``answer`` tokens after so many others."""
        listed = ",".join(map(str, depths))
        arguments = ["-m", model, "-t", self.threads, "-p", 0, "-n", answer, "-d", listed, "-r", 1]
        _, _, text = self._run("llama-bench", *arguments, "-o", "json")
        return {run["n_depth"]: run["avg_ts"] for run in json.loads(text[text.index("[") :])}

    def batch(self, model: Path, prompt: int, answer: int, batch: int) -> float:
        """llama-batched-bench: tokens/s of all sequences together, prompts not counted."""
        room = batch * (prompt + answer)
        arguments = ["-m", model, "-t", self.threads, "-c", room, "-npp", prompt, "-ntg", answer]
        _, _, text = self._run("llama-batched-bench", *arguments, "-npl", batch, "--output-format", "jsonl")
        line = next(line for line in text.splitlines() if line.lstrip().startswith("{"))
        rate: float = json.loads(line)["speed_tg"]
        return rate

    def first_token(self, model: Path) -> tuple[float, int]:
        """llama-completion, one token, without its warm-up run: seconds of the whole process, peak memory."""
        arguments = ["-m", model, "-t", self.threads, "-p", "Salam", "-n", 1, "-no-cnv", "--no-warmup"]
        seconds, peak, _ = self._run("llama-completion", *arguments)
        return seconds, peak


def found(threads: int) -> dict[str, LlamaCpp]:
    """The builds that there are: AZQUANT_PEERS names build_peers.sh's folder; of an AVX2 build (made by its
    ``--avx2``, or named by AZQUANT_PEERS_AVX2) only the kernels count, all else is the same code.
    """
    root = os.environ.get("AZQUANT_PEERS")
    if not root:
        return {}
    native = Path(root).resolve() / "llama.cpp" / "build" / "bin"
    if not (native / "llama-bench").exists():
        return {}
    builds = {"llama.cpp": LlamaCpp(native, threads)}
    avx2 = Path(os.environ.get("AZQUANT_PEERS_AVX2", native.parents[1] / "build-avx2" / "bin")).resolve()
    if (avx2 / "libggml-cpu.so").exists():
        builds["llama.cpp avx2"] = LlamaCpp(native, threads, avx2)
    return builds
