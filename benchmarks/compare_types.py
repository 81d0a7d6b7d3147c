"""Matmul with weights of every type against ggml's, interleaved: a page and JSON in benchmarks/results.

    python benchmarks/compare_types.py [--type q4_k,f16] [--m 1,4] [--isa avx2] [--threads 1]
        [--rounds 7] [--missing] [--out folder]

AZQUANT_PEERS names the folder of build_peers.sh; an ISA without AVX-512 meets the llama.cpp built for AVX2,
if that is there. Each run measures one ISA and adds its rows to what the JSON of this machine holds, so
that a long table can be made in slices; the page is made of all of them. The weights have 4096 columns;
16384 rows where x has few (more than the last cache holds), 4096 where x has many. Everyone, and a stream
read of as many bytes, runs in turn in short bursts; times are medians over rounds, ratios medians of ratios
within a round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from pathlib import Path
from typing import Any

import machine
import numpy as np
import peers
from compare_matmul import ROUNDS, Call, in_turn, stream
from matmul_report import ratio

import azquant as aq
from azquant.types import TYPES

NAMES = ("q4_0", "q8_0", "q6_k", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q3_k", "q2_k", "iq4_nl", "iq4_xs")
NAMES += ("mxfp4", "f16", "bf16", "f32")
COLUMNS = 4096
ROWS = {1: 16384, 4: 16384, 512: 4096}
"""M -> N."""
DISTINCT = 256
STREAM, BF16, TORCH = "stream", "azquant, bf16", "torch bf16"
"""The last two for F16 and BF16 weights and many rows."""
RATIOS = (("ggml", "ratio"), ("torch", "torch_ratio"))


def weights(name: str, n: int) -> aq.QTensor:
    """(n, COLUMNS) of a type, made of DISTINCT rows over and over."""
    dense = np.random.default_rng(0).standard_normal((DISTINCT, COLUMNS), dtype=np.float32)
    some = aq.quantize(dense, name).data
    return aq.QTensor(np.tile(some, n // DISTINCT), (n, COLUMNS), name)


def measure(name: str, m: int, threads: int, rounds: int, ggml: peers.Ggml | None) -> dict[str, Any]:
    """A row of the report."""
    n = ROWS[m]
    q = weights(name, n).pack()
    x = np.random.default_rng(1).standard_normal((m, COLUMNS), dtype=np.float32)
    calls: dict[str, Call] = {"azquant": lambda: aq.matmul(x, q)}
    row: dict[str, Any] = {
        "isa": aq.active_isa(),
        "threads": threads,
        "type": name,
        "m": m,
        "n": n,
        "k": COLUMNS,
    }
    if ggml:
        row["buffer_type"], multiply = ggml.matmul(q.data, n, COLUMNS, m, threads, TYPES[name].id)
        calls["ggml"] = lambda: multiply(x)
        ours, theirs = aq.matmul(x, q), multiply(x)
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(ours)
        if not error < 0.02:
            raise SystemExit(f"{name}, M = {m}: azquant and ggml differ by {error:.3f}")
    if m == max(ROWS) and name in ("f16", "bf16") and (torch := peers.torch_bf16(q.dequantize(), threads)):
        calls |= {BF16: lambda: aq.matmul(x, q, "bf16"), TORCH: lambda: torch(x)}
    if m == 1:
        calls[STREAM] = stream(1, q.nbytes)
    seconds = in_turn(calls, rounds)
    medians = {who: statistics.median(times) for who, times in seconds.items()}
    row |= {f"{who}_microseconds": value * 1e6 for who, value in medians.items()}
    row["gigabytes_per_second"] = q.nbytes / medians["azquant"] / 1e9
    row["gigamacs_per_second"] = m * n * COLUMNS / medians["azquant"] / 1e9
    if m == 1:
        row["percent_of_stream"] = 100 * ratio(seconds, STREAM, "azquant")
    if ggml:
        row["ratio"] = ratio(seconds, "ggml", "azquant")
        ggml.release()
    if TORCH in medians:
        row["torch_ratio"] = ratio(seconds, TORCH, BF16)
    return row


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a newer row replaces an older one by, and the order of the page."""
    return (-row["threads"], [*aq.isas(), row["isa"]].index(row["isa"]), NAMES.index(row["type"]), row["m"])


def misses(rows: list[dict[str, Any]]) -> str:
    """The rows in which a peer is faster, in words."""
    found = [f"{r['type']} at M = {r['m']} ({r['ratio']:.2f})" for r in rows if r.get("ratio", 1) < 1]
    found += [
        f"{r['type']} at M = {r['m']} against torch ({r['torch_ratio']:.2f})"
        for r in rows
        if r.get("torch_ratio", 1) < 1
    ]
    return ", ".join(found) or "none"


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    head = report["machine"]
    lines = [
        "# Matmul, weights of every type: azquant and ggml",
        "",
        "`AZQUANT_PEERS=folder python benchmarks/compare_types.py --isa NAME --threads N`, for each ISA "
        f"and number of threads below, on {machine.line(head)}.",
        f"Weights of {COLUMNS} columns and {ROWS[1]} rows (M = 512: {ROWS[512]}). Microseconds, medians of "
        "rounds in which all took turns, with compute `auto`. Of stream: the bytes of the GGUF weights a "
        "second, as a share of what reading a buffer of that size gave in the same rounds. x ggml: ggml's "
        "time over ours. ISAs without AVX-512 meet a ggml built for AVX2, the others one built for this "
        "machine.",
        "",
    ]
    if not any(flag.startswith("amx") for flag in head["flags"]):
        lines += [
            "This machine has no AMX: what is wanted of Q6_K and Q8_0 there (at M = 512 four times ggml) "
            "could not be measured.",
            "",
        ]
    for (_, _), found in itertools.groupby(report["rows"], lambda row: (row["threads"], row["isa"])):
        rows = list(found)
        lines += [
            f"## {rows[0]['isa']}, {rows[0]['threads']} thread(s)",
            "",
            f"Slower than a peer: {misses(rows)}.",
            "",
            "| type | "
            + " | ".join(f"M = {m} | {'of stream | ' if m == 1 else ''}x ggml" for m in ROWS)
            + " |",
            "|" + "---|" * (2 + 2 * len(ROWS)),
        ]
        for name in dict.fromkeys(row["type"] for row in rows):
            cells = [name]
            for m in ROWS:
                row = next((r for r in rows if (r["type"], r["m"]) == (name, m)), {})
                cells.append(f"{row['azquant_microseconds']:.0f}" if row else "")
                if m == 1:
                    cells.append(f"{row['percent_of_stream']:.0f}%" if row else "")
                cells.append(f"{row['ratio']:.2f}" if "ratio" in row else "")
            lines.append("| " + " | ".join(cells) + " |")
        for row in rows:
            if "torch_ratio" in row:
                ours, theirs = (row[f"{who}_microseconds"] for who in (BF16, TORCH))
                lines += [
                    "",
                    f"{row['type']} at M = {row['m']} with compute `bf16`: {ours:.0f}, torch in bf16 "
                    f"{theirs:.0f}, {row['torch_ratio']:.2f} times as fast.",
                ]
        lines.append("")
    return "\n".join(lines)


def ggml_of(isa: str) -> peers.Ggml | None:
    """The build of llama.cpp that an ISA is compared with."""
    folder = peers.ggml_folder()
    plain = folder.parents[1] / "build-avx2" / "bin" if folder and isa in ("avx2", "avxvnni") else None
    if plain and (plain / "libggml-cpu.so").exists():
        folder = plain
    return peers.Ggml(folder) if folder else None


def main() -> None:
    """Runs, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--type", default=",".join(NAMES), help="comma-separated; all by default")
    parser.add_argument("--m", default=",".join(map(str, ROWS)), help="comma-separated")
    parser.add_argument("--threads", type=int, default=machine.header()["processors"])
    parser.add_argument("--isa", default=aq.isas()[-1], help="the best one by default")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--missing", action="store_true", help="only rows that the JSON does not hold yet")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(arguments.threads))
    aq.set_num_threads(arguments.threads)
    aq.use_isa(arguments.isa)
    ggml = ggml_of(arguments.isa)
    if not ggml:
        print("no ggml: AZQUANT_PEERS is not set")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"types-{machine.slug()}.json"
    report = json.loads(path.read_text()) if path.exists() else {"rows": []}
    report["machine"] = machine.header()
    rows = {key(row): row for row in report["rows"]}
    new = []
    for name, m in itertools.product(arguments.type.split(","), map(int, arguments.m.split(","))):
        wanted = {"threads": arguments.threads, "isa": arguments.isa, "type": name, "m": m}
        if arguments.missing and key(wanted) in rows:
            continue
        row = measure(name, m, arguments.threads, arguments.rounds, ggml)
        new.append(row)
        rows[key(row)] = row
        rates = f"{row['gigabytes_per_second']:6.1f} GB/s {row['gigamacs_per_second']:6.0f} GMAC/s"
        ratios = [f"{who} {row[what]:.2f}" for who, what in RATIOS if what in row]
        print(f"{name:8} {m:4} {row['azquant_microseconds']:10.0f} us {rates}", *ratios, flush=True)
        report["rows"] = [rows[at] for at in sorted(rows)]
        path.write_text(json.dumps(report, indent=1) + "\n")
        path.with_suffix(".md").write_text(markdown(report))
    print(f"slower than a peer: {misses(new)}\n{path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
