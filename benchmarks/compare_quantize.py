"""Quantizing against ggml and llama-quantize, interleaved in one run.

    AZQUANT_PEERS=... python benchmarks/compare_quantize.py types            # one core, every type
    AZQUANT_PEERS=... python benchmarks/compare_quantize.py file [gpt2-134m] # a whole file, --threads

AZQUANT_PEERS is the folder of build_peers.sh. "types" gives millions of weights a second of ggml's reference
(libggml-base, what llama-quantize runs) and how many times that azquant makes. "file" quantizes an F32 file
to Q4_0: seconds with the page cache warm, and the peak resident memory. azquant runs twice: as llama-quantize
does, without waiting for the disk (verify=False), and as it does unless told otherwise, with fsync and
reading back; its interpreter start is told apart. Each run writes a new file, with nothing left to write to
the disk before.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peers
import random_models

import azquant as aq
from azquant.types import TYPES

ROUNDS = 3
FILE_ROUNDS = 7
_FILE = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
start = time.perf_counter()
import azquant
azquant.set_num_threads(int(sys.argv[4]))
verify = sys.argv[5] == "verify"
from azquant import quantize_file
ready = time.perf_counter()
quantize_file(*sys.argv[1:4], verify=verify)
print(json.dumps({"import": ready - start, "quantize": time.perf_counter() - ready}))
"""


def burst(run: Callable[[], Any]) -> float:
    """Seconds of the quickest of three calls."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def compare_types(folder: Path) -> None:
    """Prints a row for each type."""
    base = ctypes.CDLL(str(folder / "libggml-base.so"))
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    base.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
    rows, k = 64, 2048
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(rows, k)) * 0.02).astype(np.float32)
    importance = rng.gamma(1.0, size=k).astype(np.float32)
    values = np.empty(rows * k, np.float32)
    aq.set_num_threads(1)
    isas = aq.isas()
    print(f"{'':8} {'':10} {'ggml M/s':>9}  " + "".join(f"{isa:>12}" for isa in isas))
    for name, type_ in TYPES.items():
        if not (type_.can_quantize and type_.is_quantized):
            continue
        q = aq.quantize(x, name)
        made = q.data.copy()
        decode = getattr(base, "dequantize_row_" + (name[:-1] + "K" if name.endswith("_k") else name))

        def reference(given: int | None, number: int = type_.id, made: Any = made) -> None:
            base.ggml_quantize_chunk(number, x.ctypes.data, made.ctypes.data, 0, rows, k, given)

        def decoded(decode: Any = decode, made: Any = made) -> None:
            decode(pointer(made.ctypes.data), pointer(values.ctypes.data), long(values.size))

        for what, theirs, ours in (
            ("plain", lambda: reference(None), lambda name=name: aq.quantize(x, name)),
            (
                "imatrix",
                lambda: reference(importance.ctypes.data),
                lambda name=name: aq.quantize(x, name, imatrix=importance),
            ),
            ("dequantize", decoded, q.dequantize),
        ):
            ratios: dict[str, list[float]] = {isa: [] for isa in isas}
            speeds = []
            for _ in range(ROUNDS):
                seconds = burst(theirs)
                speeds.append(rows * k / seconds / 1e6)
                for isa in isas:
                    aq.use_isa(isa)
                    ratios[isa].append(seconds / burst(ours))
            shown = "".join(f"{statistics.median(ratios[isa]):11.2f}x" for isa in isas)
            print(f"{name:8} {what:10} {statistics.median(speeds):9.1f}  {shown}", flush=True)


def run(command: list[str]) -> tuple[float, int, str]:
    """Seconds, peak resident bytes and standard output of a program."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        out.seek(0)
        text = out.read().decode(errors="replace")
    if status:
        raise SystemExit(f"{command[0]} ended with status {status}")
    return seconds, usage.ru_maxrss * 1024, text


def compare_file(folder: Path, model: str, target: str, threads: int) -> None:
    """Prints both programs' times and memory."""
    with tempfile.TemporaryDirectory() as place:
        source, ours, theirs = (str(Path(place) / name) for name in ("f32.gguf", "ours.gguf", "theirs.gguf"))
        random_models.write_model(model, Path(source), "f32")
        commands = {
            "llama-quantize": [str(folder / "llama-quantize"), source, theirs, target, str(threads)],
            "azquant": [sys.executable, "-c", _FILE, source, ours, target, str(threads), "not"],
            "azquant, verified": [sys.executable, "-c", _FILE, source, ours, target, str(threads), "verify"],
        }
        seen: dict[str, list[tuple[float, int, str]]] = {name: [] for name in commands}
        for done in range(FILE_ROUNDS + 1):
            for name, command in commands.items():
                for made in (ours, theirs):
                    Path(made).unlink(missing_ok=True)
                os.sync()
                row = run(command)
                if done:  # the first round brings the source into the page cache
                    seen[name].append(row)
        llama = statistics.median(row[0] for row in seen["llama-quantize"])
        print(f"{model} to {target}, {threads} threads, median of {FILE_ROUNDS} rounds (lowest, highest)")
        for name, rows in seen.items():
            peak = max(row[1] for row in rows)
            times = [row[0] for row in rows]
            whole = statistics.median(times)
            spread = f"({min(times):.2f}, {max(times):.2f})"
            print(f"  {name:17} {whole:6.2f} s {spread}, peak {peak / 1e6:.0f} MB")
            if name == "llama-quantize":
                continue
            parts = [json.loads(row[2]) for row in rows]
            for part in parts[0]:
                times = [p[part] for p in parts]
                spread = f"({min(times):.2f}, {max(times):.2f})"
                print(f"    {part:15} {statistics.median(times):6.2f} s {spread}")
            quantizing = statistics.median(part["quantize"] for part in parts)
            ratio = f"{llama / quantizing:.1f} times llama-quantize"
            print(f"    {ratio}; {llama / whole:.1f} with the interpreter's start")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("types", "file"))
    parser.add_argument("model", nargs="?", default="gpt2-134m", choices=random_models.SHAPES)
    parser.add_argument("--target", default="q4_0")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    libraries = peers.ggml_folder()
    if libraries is None:
        raise SystemExit("AZQUANT_PEERS does not name the folder of build_peers.sh")
    if arguments.what == "types":
        compare_types(libraries)
    else:
        compare_file(libraries, arguments.model, arguments.target, arguments.threads)
