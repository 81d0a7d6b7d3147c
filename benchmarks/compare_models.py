"""Whole models against llama.cpp, interleaved in one run: JSON, tables and plots.

    AZQUANT_PEERS=build/peers python benchmarks/compare_models.py                 # everything: half an hour
    ... compare_models.py --models gpt2-134m --metrics decode prefill --rounds 3   # a piece of it
    ... compare_models.py --report-only                                            # tables from the JSON

The models are made on the way (random weights, see random_models.py) and kept in --cache. Each run replaces
what it measured in the JSON file and leaves the rest. Ratios are between figures of one run only. Contenders
are azquant on the best instruction set, on AVX2 and on NumPy, llama.cpp built natively, and with AVX2 alone
where build_peers.sh --avx2 made that. Figures are medians over rounds in which all ran in turn.

    decode      128 tokens one by one after a short prompt   (azquant: the model's steps; llama-bench)
    prefill     a prompt of 512 tokens                       (the same)
    batch       16 sequences, a token of each at every step  (the same, and submit(); llama-batched-bench)
    load        the whole process, to one token of text      (Python start included; llama-completion)
    memory      peak resident, 512 tokens in, 128 out        (generate(); llama-bench)
    positions   time per token at every position of the context
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import llama_cpp
import machine
import model_report
import random_models
from model_worker import ANSWER, PROMPT, SEQUENCES

import azquant as aq
from azquant import cpu

METRICS = ("decode", "prefill", "batch", "load", "memory", "positions")
ON_POSITIONS = ("gpt2-134m", "llama-134m")
ON_AVX2 = ("gpt2-134m", "llama-134m")
BATCH_PROMPT, BATCH_STEPS = 16, 32
NUMPY = {"decode": 8, "prefill": 64, "batch": 2}
"""Tokens (steps for the batch) of NumPy's runs: it is slow, and its speed does not depend on the length."""
PAUSE = 0.1
"""Seconds before each measurement, so that the threads of the one before are asleep."""

Environment = dict[str, str]


class Ours:
    """azquant in a process of its own, with the kernels that ``environment`` chooses."""

    def __init__(self, name: str, environment: Environment, model: Path, threads: int) -> None:
        self.name, self.numpy = name, environment.get("AZQUANT_BACKEND") == "numpy"
        self._command = [sys.executable, str(Path(__file__).with_name("model_worker.py")), str(model)]
        self._command.append(str(threads))
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        threads_of_blas = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
        self._environment = {**os.environ, **threads_of_blas, **environment, "PYTHONPATH": path}
        self._process: subprocess.Popen[str] | None = None

    def ask(self, do: str, **job: Any) -> Any:
        """Has the process do a job; it is started, and loads the model, with the first one."""
        if self._process is None:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                self._command, stdin=pipe, stdout=pipe, text=True, env=self._environment
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **job}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: the process ended; it should have done {do}")
        return json.loads(line)

    def once(self, what: str) -> tuple[float, str]:
        """Seconds and output of a process that does one thing."""
        command = [*self._command, what]
        start = time.perf_counter()
        done = subprocess.run(command, env=self._environment, stdout=subprocess.PIPE, text=True, check=True)
        return time.perf_counter() - start, done.stdout

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()


class Comparison:
    """The contenders on one model, and what they reach."""

    def __init__(self, name: str, model: Path, threads: int, only: list[str] | None) -> None:
        self.name, self.model, self.threads = name, model, threads
        kinds: dict[str, Environment] = {"azquant": {}}
        if name in ON_AVX2 and "avx2" in aq.isas()[:-1]:
            kinds["azquant avx2"] = {"AZQUANT_ISA": "avx2"}
        kinds["azquant numpy"] = {"AZQUANT_BACKEND": "numpy"}
        self.ours = {
            kind: Ours(kind, environment, model, threads)
            for kind, environment in kinds.items()
            if only is None or kind in only
        }
        self.theirs = {
            kind: build
            for kind, build in llama_cpp.found(threads).items()
            if (kind == "llama.cpp" or name in ON_AVX2) and (only is None or kind in only)
        }
        self.records: list[dict[str, Any]] = []
        self._limits: dict[str, Any] | None = None
        self.run = datetime.now(timezone.utc).isoformat(timespec="seconds")

    def close(self) -> None:
        """Ends the processes."""
        for ours in self.ours.values():
            ours.close()

    def _record(self, metric: str, contender: str, unit: str, samples: list[float], **more: Any) -> None:
        value = statistics.median(samples)
        row = {"model": self.name, "metric": metric, "contender": contender, "value": value, "unit": unit}
        row |= {"samples": samples, "run": self.run, "threads": self.threads, **more}
        self.records.append(row)
        print(f"{self.name:15} {metric:9} {contender:24} {value:10.4g} {unit}", flush=True)

    def _in_turn(self, metric: str, unit: str, calls: dict[str, Callable[[], float]], rounds: int) -> None:
        """Rounds of everybody in turn. NumPy, some hundred times slower, runs twice."""
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for i in range(rounds):
            for name, call in calls.items():
                if "numpy" in name and i > 1:
                    continue
                time.sleep(PAUSE)
                samples[name].append(call())
        for name, values in samples.items():
            more = self._limit() if (metric, name) == ("decode", "azquant") else {}
            self._record(metric, name, unit, values, **more)

    def _limit(self) -> dict[str, Any]:
        """What memory allows the compiled kernels, asked once a run."""
        if self._limits is None:
            self._limits = self.ours["azquant"].ask("limit")
        return self._limits

    def decode(self, rounds: int) -> None:
        """One sequence, ANSWER tokens."""
        calls: dict[str, Callable[[], float]] = {}
        for name, ours in self.ours.items():
            tokens = NUMPY["decode"] if ours.numpy else ANSWER
            ours.ask("decode", tokens=2, batch=1, prompt=1)
            calls[name] = lambda ours=ours, n=tokens: n / ours.ask("decode", tokens=n, batch=1, prompt=1)
        for name, build in self.theirs.items():
            calls[name] = lambda build=build: build.bench(self.model, 0, ANSWER)[0]["decode"]
        self._in_turn("decode", "tokens/s", calls, rounds)

    def prefill(self, rounds: int) -> None:
        """A prompt of PROMPT tokens."""
        calls: dict[str, Callable[[], float]] = {}
        for name, ours in self.ours.items():
            tokens = NUMPY["prefill"] if ours.numpy else PROMPT
            ours.ask("prefill", tokens=tokens)
            calls[name] = lambda ours=ours, n=tokens: n / ours.ask("prefill", tokens=n)
        for name, build in self.theirs.items():
            calls[name] = lambda build=build: build.bench(self.model, PROMPT, 0)[0]["prefill"]
        self._in_turn("prefill", "tokens/s", calls, rounds)

    def batch(self, rounds: int) -> None:
        """SEQUENCES sequences at once, all tokens counted."""
        calls: dict[str, Callable[[], float]] = {}
        for name, ours in self.ours.items():
            job = {"tokens": BATCH_STEPS, "batch": SEQUENCES, "prompt": BATCH_PROMPT}
            if ours.numpy:
                job |= {"tokens": NUMPY["batch"], "prompt": 1}
            done = job["tokens"] * SEQUENCES
            ours.ask("decode", **{**job, "tokens": 1})
            calls[name] = lambda ours=ours, job=job, done=done: done / ours.ask("decode", **job)
            if not ours.numpy:
                ours.ask("schedule", **{**job, "tokens": 2})
                calls[f"{name} submit()"] = lambda ours=ours, job=job, done=done: (
                    done / ours.ask("schedule", **job)
                )
        for name, build in self.theirs.items():
            calls[name] = lambda build=build: build.batch(self.model, BATCH_PROMPT, BATCH_STEPS, SEQUENCES)
        self._in_turn("batch", "tokens/s", calls, rounds)

    def load(self, rounds: int) -> None:
        """Processes from start to end; the first round only warms the page cache."""
        calls: dict[str, Callable[[], float]] = {
            name: lambda ours=ours: ours.once("first")[0] for name, ours in self.ours.items()
        }
        if "llama.cpp" in self.theirs:
            calls["llama.cpp"] = lambda: self.theirs["llama.cpp"].first_token(self.model)[0]
        for call in calls.values():
            call()
        self._in_turn("load", "s", calls, max(rounds, 5))

    def memory(self, rounds: int) -> None:
        """Peaks of whole processes; they hardly vary."""
        if "azquant" in self.ours:
            found = json.loads(self.ours["azquant"].once("whole")[1])
            file_bytes = self.model.stat().st_size
            self._record("memory", "azquant", "B", [found["peak"]], kv=found["kv"], file_bytes=file_bytes)
        if "llama.cpp" in self.theirs:
            self._record(
                "memory", "llama.cpp", "B", [self.theirs["llama.cpp"].bench(self.model, PROMPT, ANSWER)[1]]
            )

    def positions(self, rounds: int) -> None:
        """Milliseconds a token over the positions: the median over rounds at each."""
        if self.name not in ON_POSITIONS:
            return
        context, depths = 1024, [0, 256, 512, 768, 960]
        runs: list[list[float]] = []
        rates: dict[str, list[list[float]]] = {name: [] for name in self.theirs}
        for _ in range(rounds):
            if "azquant" in self.ours:
                runs.append(self.ours["azquant"].ask("positions", tokens=context))
            for name, build in self.theirs.items():
                found = build.at_depths(self.model, depths, 32)
                rates[name].append([found[depth] for depth in depths])
        if runs:
            middle = [1e3 * statistics.median(at) for at in zip(*runs, strict=True)]
            self._record("positions", "azquant", "ms/token", middle, at=list(range(context)), **self._limit())
        for name, found in rates.items():
            middle = [1e3 / statistics.median(at) for at in zip(*found, strict=True)]
            self._record("positions", name, "ms/token", middle, at=[depth + 16 for depth in depths])


def merge(path: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    """The report at ``path`` with these records in place of older ones of the same kind."""
    header = machine.header()
    report: dict[str, Any] = {"machine": header, "records": []}
    if path.exists():
        old = json.loads(path.read_text())
        if old["machine"]["cpu"] == header["cpu"]:
            report["records"] = old["records"]
            report["machine"] = header if records else old["machine"]
    measured = {(row["model"], row["metric"]) for row in records}
    kept = [row for row in report["records"] if (row["model"], row["metric"]) not in measured]
    order = list(random_models.SHAPES)
    report["records"] = sorted(kept + records, key=lambda row: order.index(row["model"]))
    return report


def main() -> None:
    """Measures what was asked for and writes the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", choices=random_models.SHAPES, default=list(random_models.SHAPES)
    )
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=METRICS)
    parser.add_argument(
        "--contenders", nargs="+", help='such as "azquant" "llama.cpp"; default: all there are'
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cpu.default_threads())
    parser.add_argument("--cache", type=Path, default=Path("build/models"), help="where models are kept")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--report-only", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    if not llama_cpp.found(arguments.threads) and not arguments.report_only:
        print("AZQUANT_PEERS does not name the folder of build_peers.sh: azquant runs alone", file=sys.stderr)
    stem = arguments.out / f"models-{machine.slug()}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in [] if arguments.report_only else arguments.models:
        path = random_models.cached_model(name, arguments.cache)
        comparison = Comparison(name, path, arguments.threads, arguments.contenders)
        try:
            for metric in arguments.metrics:
                getattr(comparison, metric)(arguments.rounds)
        finally:
            comparison.close()
        report = merge(stem.with_suffix(".json"), comparison.records)  # after each model: hours may pass
        stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    report = merge(stem.with_suffix(".json"), [])
    stem.with_suffix(".md").write_text(model_report.markdown(report))
    model_report.plot(report, stem)
    print(f"written: {stem}.json, .md and pictures")


if __name__ == "__main__":
    main()
