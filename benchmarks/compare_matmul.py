"""Matmul against its peers, interleaved in one run: JSON, a table and plots.

    python benchmarks/compare_matmul.py [--quick] [--threads 1] [--weights memory] [--out benchmarks/results]

AZQUANT_PEERS names the folder of build_peers.sh for ggml; onnxruntime, OpenVINO and PyTorch take part when
installed. Every figure is the median over rounds in which all of them ran in turn, each in a short burst.
With weights in "cache" one matrix is multiplied by again and again; with weights in "memory" everyone goes
round as many copies as fill MEMORY_BYTES, as a model does that is larger than the processor's caches.
"percent" is of the stream-read bandwidth measured in the same run on a buffer of that size (M = 1), or of the
int8 peak, for rows named bf16 the bf16 peak (larger M). Rows of azquant are named after an ISA and mean int8
there, unless bf16 is said; "ours" is what ``compute="auto"`` chooses.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import numpy as np
import peers

import azquant as aq
from azquant import limits

SHAPES = ((4096, 4096), (11008, 4096), (3072, 768), (768, 3072))  # (N, K)
ROWS = {"cache": (1, 4, 8, 16, 32, 128, 512), "memory": (1, 2, 4, 8, 16, 32)}
MEMORY_BYTES, MEMORY_SHAPE = 256 << 20, 1 << 24  # what the copies fill; the least N * K measured so
ROUNDS = 5


def our_name(isa: str, compute: str) -> str:
    """A row's name."""
    return f"azquant {isa}" if compute == "int8" else f"azquant {isa} {compute}"


def copies_of(q: aq.QTensor, place: str) -> list[aq.QTensor]:
    """The weights, as often as they are wanted in cache or in memory."""
    copies = 1 if place == "cache" else MEMORY_BYTES // q.nbytes + 1
    return [q, *(aq.QTensor(q.data.copy(), q.shape, q.type).pack() for _ in range(1, copies))]


def in_turn(multiplies: list[peers.Multiply]) -> peers.Multiply:
    """One function out of one per copy."""
    endless = itertools.cycle(multiplies)
    return lambda x: next(endless)(x)


def contenders(
    weights: list[aq.QTensor], dense: np.ndarray, m: int, threads: int, ggml: peers.Ggml | None
) -> dict[str, peers.Multiply]:
    """Name to multiply, ours first (the best ISA, then the weaker ones)."""
    found: dict[str, peers.Multiply] = {}
    q = weights[0]
    n, k = q.shape
    for isa in reversed(aq.isas()[1:]):
        for compute in ("int8", "bf16"):
            aq.use_isa(isa)
            if compute == "bf16" and not limits.peak_bf16(1):
                continue
            if aq.cpu.choice(m, n, k, q.type, compute).isa != isa:  # a weaker one's kernel
                continue

            endless = itertools.cycle(weights)

            def ours(
                x: np.ndarray, isa: str = isa, compute: str = compute, endless: Iterator[aq.QTensor] = endless
            ) -> Any:
                if aq.active_isa() != isa:
                    aq.use_isa(isa)
                return aq.matmul(x, next(endless), compute)

            found[our_name(isa, compute)] = ours
    if ggml:
        loaded = [ggml.matmul(q.data, n, k, m, threads) for _ in weights]
        found[f"ggml ({loaded[0][0]})"] = in_turn([multiply for _, multiply in loaded])
    for name, make in (
        ("onnxruntime MatMulNBits", peers.onnxruntime_nbits),
        ("OpenVINO int4", peers.openvino_int4),
        ("torch bf16", peers.torch_bf16),
        ("torch int4pack", peers.torch_int4),
    ):
        made = [make(dense, threads) for _ in weights]
        multiplies = [multiply for multiply in made if multiply]
        if multiplies:
            found[name] = in_turn(multiplies)
    if m <= 32 and len(weights) == 1:
        found["azquant NumPy fallback"] = peers.numpy_fallback(q)
    return found


def time_in_turn(
    calls: dict[str, peers.Multiply], x: np.ndarray, seconds: float, copies: int
) -> dict[str, float]:
    """Median seconds of each, in turn: a burst of calls, then a pause in which its threads go to sleep.

    Without the pause the spinning threads of one library (OpenMP's, BLAS's) slow down the next.
    """
    for multiply in calls.values():
        for _ in range(copies):  # a peer may prepare each of its copies when it first meets it
            multiply(x)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, multiply in calls.items():
            time.sleep(0.03)
            end = time.perf_counter() + seconds / ROUNDS
            burst: list[float] = []
            while len(burst) < 4 or time.perf_counter() < end:
                start = time.perf_counter()
                multiply(x)
                burst.append(time.perf_counter() - start)
            times[name] += burst[2:]  # the first two wake threads and fill caches
    return {name: statistics.median(values) for name, values in times.items()}


def run(seconds: float, places: list[str], all_threads: list[int], quick: bool) -> dict[str, Any]:
    """Every number of threads, place, shape and M."""
    folder = peers.ggml_folder()
    ggml = peers.Ggml(folder) if folder else None
    rng = np.random.default_rng(0)
    report: dict[str, Any] = {"machine": machine.header(), "limits": {}, "rows": []}
    for threads in all_threads:
        aq.set_num_threads(threads)
        aq.use_isa(aq.isas()[-1])
        peak, bf16_peak = limits.peak_int8(), limits.peak_bf16()
        report["limits"][str(threads)] = {
            "int8_macs_per_second": peak,
            "bf16_macs_per_second": bf16_peak,
        }
        for place, (n, k) in itertools.product(places, SHAPES):
            if (quick and (n, k) != SHAPES[0]) or (place == "memory" and n * k < MEMORY_SHAPE):
                continue
            dense = rng.standard_normal((n, k), dtype=np.float32)
            q = aq.quantize(dense).pack()
            weights = copies_of(q, place)
            aq.use_isa(aq.isas()[-1])
            bandwidth = limits.stream_read(q.nbytes * len(weights))
            report["limits"][str(threads)][f"stream_read_{q.nbytes * len(weights)}"] = bandwidth
            for m in ROWS[place]:
                x = rng.standard_normal((m, k), dtype=np.float32)
                medians = time_in_turn(contenders(weights, dense, m, threads, ggml), x, seconds, len(weights))
                if ggml:
                    ggml.release()
                aq.use_isa(aq.isas()[-1])
                chosen = aq.cpu.choice(m, n, k)
                ours = medians[our_name(chosen.isa, chosen.compute)]
                for name, value in medians.items():
                    limit = bf16_peak if name.endswith("bf16") and bf16_peak else peak
                    percent = q.nbytes / value / bandwidth if m == 1 else m * n * k / value / limit
                    row = {
                        "threads": threads,
                        "weights": place,
                        "m": m,
                        "n": n,
                        "k": k,
                        "name": name,
                        "chosen": value == ours,
                        "microseconds": value * 1e6,
                        "gigabytes_per_second": q.nbytes / value / 1e9,
                        "gigamacs_per_second": m * n * k / value / 1e9,
                        "percent_of_limit": 100 * percent,
                        "times_ours": value / ours,
                    }
                    report["rows"].append(row)
                    where = f"{threads} {place:6} {m:4} {n:6} {k:6} {name:28}"
                    print(f"{where} {value * 1e6:10.1f} us  x{value / ours:.2f}", flush=True)
    return report


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    head = report["machine"]
    lines = [
        "# Matmul, Q4_0 weights: azquant and its peers",
        "",
        f"`python benchmarks/compare_matmul.py` on {head['cpu']} ({', '.join(head['flags'])}), "
        f"{head['processors']} processors, {head['compiler']}, versions {head['versions']}.",
        "Medians in microseconds, interleaved. Percent: M = 1 of stream read on a buffer of that size, "
        "else of the best ISA's bf16 peak for rows named bf16, its int8 peak for others; all of this run.",
        "",
    ]
    for threads, found in report["limits"].items():
        reads = ", ".join(
            f"{int(key.rsplit('_', 1)[1]) / 1e6:.1f} MB {value / 1e9:.1f} GB/s"
            for key, value in found.items()
            if key.startswith("stream")
        )
        peaks = " and ".join(
            f"{kind} {found[f'{kind}_macs_per_second'] / 1e9:.0f}" for kind in ("int8", "bf16")
        )
        lines.append(f"- {threads} thread(s): peak {peaks} GMAC/s; stream read {reads}")
    for threads, place in itertools.product(report["limits"], ROWS):
        rows = [row for row in report["rows"] if (str(row["threads"]), row["weights"]) == (threads, place)]
        if not rows:
            continue
        names = list(dict.fromkeys(row["name"] for row in rows))
        lines += [
            "",
            f"## {threads} thread(s), weights in {place}",
            "",
            "| M | N x K | " + " | ".join(names) + " | ours, percent |",
        ]
        lines.append("|" + "---|" * (len(names) + 3))
        for m, n, k in dict.fromkeys((row["m"], row["n"], row["k"]) for row in rows):
            cells = {row["name"]: row for row in rows if (row["m"], row["n"], row["k"]) == (m, n, k)}
            shown = [f"{cells[name]['microseconds']:.0f}" if name in cells else "" for name in names]
            ours = next(row for row in cells.values() if row["chosen"])
            percent = f"{ours['percent_of_limit']:.0f}%"
            lines.append(f"| {m} | {n} x {k} | " + " | ".join(shown) + f" | {percent} |")
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Time relative to ours, by M, for the largest number of threads."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return
    threads, place = max(row["threads"] for row in report["rows"]), report["rows"][0]["weights"]
    found = [row for row in report["rows"] if (row["threads"], row["weights"]) == (threads, place)]
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in found))
    figure, axes = plt.subplots(1, len(shapes), figsize=(4.5 * len(shapes), 4), sharey=True, squeeze=False)
    for axis, (n, k) in zip(axes[0], shapes, strict=True):
        rows = [row for row in found if (row["n"], row["k"]) == (n, k)]
        for name in dict.fromkeys(row["name"] for row in rows):
            points = [(row["m"], row["times_ours"]) for row in rows if row["name"] == name]
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="rows of x (M)", title=f"N = {n}, K = {k}")
        axis.set_xticks(ROWS[place], [str(m) for m in ROWS[place]])
        axis.grid(True, which="both", alpha=0.3)
    axes[0][0].set_ylabel(f"time, ours = 1 (lower is faster; {threads} threads, weights in {place})")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Runs, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, short rounds")
    parser.add_argument("--threads", type=int, help="only this number; otherwise 1 and all processors")
    parser.add_argument("--weights", choices=tuple(ROWS), help="only there; otherwise both")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    report = run(
        0.1 if arguments.quick else 0.4,
        [arguments.weights] if arguments.weights else list(ROWS),
        [arguments.threads] if arguments.threads else sorted({1, machine.header()["processors"]}),
        arguments.quick,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"matmul-{machine.slug()}"
    (arguments.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / f"{name}.md").write_text(markdown(report))
    plot(report, arguments.out / f"{name}.png")
    print(f"written: {arguments.out / name}.json, .md, .png")


if __name__ == "__main__":
    main()
