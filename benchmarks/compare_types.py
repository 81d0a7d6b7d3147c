"""Matmul with weights of every type against ggml's, interleaved in one run: a table, and JSON where asked.

    python benchmarks/compare_types.py [--type q4_k,f16] [--threads 1] [--isa avx2] [--json results.json]

AZQUANT_PEERS names the folder of build_peers.sh. The weights have 4096 columns; 16384 rows where x has few
(more than the last cache holds), 4096 where x has many. Every figure is the median over rounds in which both
ran in turn, each in a short burst; "ratio" is ggml's time over ours, and a row below 1 is named at the end.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import machine
import numpy as np
import peers
from compare_matmul import time_in_turn

import azquant as aq
from azquant import limits
from azquant.types import TYPES

NAMES = ("q4_0", "q8_0", "q6_k", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q3_k", "q2_k", "iq4_nl", "iq4_xs")
NAMES += ("mxfp4", "f16", "bf16", "f32")
COLUMNS = 4096
ROWS = {1: 16384, 4: 16384, 512: 4096}
"""M -> N."""
DISTINCT = 256


def weights(name: str, n: int) -> aq.QTensor:
    """(n, COLUMNS) of a type, made of DISTINCT rows over and over."""
    dense = np.random.default_rng(0).standard_normal((DISTINCT, COLUMNS), dtype=np.float32)
    some = aq.quantize(dense, name).data
    return aq.QTensor(np.tile(some, n // DISTINCT), (n, COLUMNS), name)


def compare(names: list[str], threads: int, seconds: float, ggml: peers.Ggml | None) -> list[dict[str, Any]]:
    """A row per type and M."""
    rows: list[dict[str, Any]] = []
    for name in names:
        for m, n in ROWS.items():
            q = weights(name, n).pack()
            x = np.random.default_rng(1).standard_normal((m, COLUMNS), dtype=np.float32)
            calls: dict[str, peers.Multiply] = {"azquant": lambda x, q=q: aq.matmul(x, q)}
            buffer_type = ""
            if ggml:
                buffer_type, calls["ggml"] = ggml.matmul(q.data, n, COLUMNS, m, threads, TYPES[name].id)
                ours, theirs = calls["azquant"](x), calls["ggml"](x)
                error = np.linalg.norm(ours - theirs) / np.linalg.norm(ours)
                if not error < 0.02:
                    raise SystemExit(f"{name}, M = {m}: azquant and ggml differ by {error:.3f}")
            medians = time_in_turn(calls, x, seconds, 1)
            row = {"type": name, "m": m, "n": n, "k": COLUMNS, "threads": threads, "buffer_type": buffer_type}
            row |= {f"{who}_microseconds": value * 1e6 for who, value in medians.items()}
            row["gigabytes_per_second"] = q.nbytes / medians["azquant"] / 1e9
            row["gigamacs_per_second"] = m * n * COLUMNS / medians["azquant"] / 1e9
            if ggml:
                row["ratio"] = medians["ggml"] / medians["azquant"]
            rows.append(row)
            theirs_us = f"{medians['ggml'] * 1e6:10.0f} {row['ratio']:6.2f}x  {buffer_type}" if ggml else ""
            rates = f"{row['gigabytes_per_second']:6.1f} GB/s {row['gigamacs_per_second']:6.0f} GMAC/s"
            ours_us = f"{medians['azquant'] * 1e6:10.0f}"
            print(f"{threads} {name:8} {m:4} {n:6} {ours_us} {rates} {theirs_us}", flush=True)
    return rows


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--type", default=",".join(NAMES), help="comma-separated; all by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", default=None, help="the best one by default")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each row of the table")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(arguments.threads))
    folder = peers.ggml_folder()
    ggml = peers.Ggml(folder) if folder else None
    aq.set_num_threads(arguments.threads)
    aq.use_isa(arguments.isa or aq.isas()[-1])
    names = arguments.type.split(",")
    report: dict[str, Any] = {"machine": machine.header()}
    report["stream_read"] = limits.stream_read(1 << 26)
    report["int8_macs_per_second"] = limits.peak_int8()
    limit = f"{report['stream_read'] / 1e9:.1f} GB/s over 64 MB"
    limit += f", {report['int8_macs_per_second'] / 1e9:.0f} GMAC/s int8"
    print(f"{aq.active_isa()}, {arguments.threads} thread(s): {limit}")
    print("threads, type, M, N, azquant us, its GB/s of GGUF bytes and GMAC/s, ggml us, ratio, ggml's buffer")
    report["rows"] = compare(names, arguments.threads, arguments.seconds, ggml)
    missed = [
        f"{r['type']} at M = {r['m']}: {r['ratio']:.2f}" for r in report["rows"] if r.get("ratio", 1) < 1
    ]
    print(
        "slower than ggml: " + ("; ".join(missed) or "none") if ggml else "no ggml: AZQUANT_PEERS is not set"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
