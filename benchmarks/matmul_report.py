"""The page and the plot of compare_matmul's JSON."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine

__all__ = ["markdown", "name_of", "plot"]

OURS = "azquant auto"
PEERS = ("ggml", "onnxruntime MatMulNBits", "OpenVINO int4", "torch bf16", "torch int4pack")
PROBES = ("stream read", "peak int8", "peak bf16", "azquant auto, M = 1")
LARGE = 4096 * 4096
NO_AMX = "needs AMX"


def name_of(isa: str, compute: str) -> str:
    """A row's name."""
    return f"azquant {isa}" if compute == "int8" else f"azquant {isa} {compute}"


def ratio(seconds: dict[str, list[float]], a: str, b: str) -> float:
    """How many times b's time a takes: the median over rounds."""
    return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))


@dataclass(frozen=True)
class Row:
    """One M of one slice of matmul."""

    threads: int
    place: str
    n: int
    k: int
    m: int
    chosen: str
    seconds: dict[str, list[float]]
    nbytes: int
    peak_macs: dict[str, int]

    @property
    def large(self) -> bool:
        return self.n * self.k >= LARGE

    def of_peak(self, name: str) -> float:
        """Multiply-adds a second, of the peak in the same round: bf16's for rows of that name."""
        peak = "peak bf16" if name.endswith("bf16") and "peak bf16" in self.seconds else "peak int8"
        return self.m * self.n * self.k / self.peak_macs[peak] * ratio(self.seconds, peak, name)


def matmul_rows(report: dict[str, Any]) -> list[Row]:
    """Every M of every matmul slice."""
    return [
        Row(
            s["threads"],
            s["what"],
            s["n"],
            s["k"],
            row["m"],
            row["chosen"],
            row["seconds"],
            s["nbytes"],
            s["peak_macs"],
        )
        for s in report["slices"].values()
        if s["what"] in ("cache", "memory")
        for row in s["rows"]
    ]


# ---- targets -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A goal and what was measured for it: one figure for each threads, place and shape it speaks of."""

    work: str
    goal: str
    least: float | None  # the worst of the figures must be this; None: cannot be measured here
    found: list[tuple[float, str]]  # figure, where
    unit: str = "x"
    most: bool = False  # a limit from above

    def line(self) -> str:
        """A row of the table."""
        if self.least is None:
            return f"| {self.work} | {self.goal} | | {NO_AMX} |"
        if not self.found:
            return f"| {self.work} | {self.goal} | | not measured |"
        ordered = sorted(self.found, reverse=self.most)
        scale = 100 if self.unit == "%" else 1
        shown = [
            f"{figure * scale:.{0 if scale == 100 else 2}f}{self.unit}"
            for figure, _ in (ordered[0], ordered[-1])
        ]
        met = [(figure <= self.least) if self.most else (figure >= self.least) for figure, _ in self.found]
        verdict = "met" if all(met) else f"**missed** in {len(met) - sum(met)} of {len(met)}"
        span = shown[0] if len(ordered) == 1 else f"{shown[0]} ({ordered[0][1]}) to {shown[1]}"
        return f"| {self.work} | {self.goal} | {span} | {verdict} |"


def where(row: Row) -> str:
    """A row's circumstances."""
    return f"{row.n} x {row.k}, {row.threads} thr., {row.place}"


def against(rows: Iterable[Row], ours: str, peers: Iterable[str]) -> list[tuple[float, str]]:
    """How many times our time the fastest of those peers takes."""
    return [
        min(
            (ratio(row.seconds, peer, ours), f"{peer}, {where(row)}") for peer in peers if peer in row.seconds
        )
        for row in rows
        if ours in row.seconds and any(peer in row.seconds for peer in peers)
    ]


def block_figures(
    report: dict[str, Any], what: str, place: str, threads: int, name: str
) -> list[dict[str, Any]]:
    """Rows of quantize or dequantize that have that name."""
    return [
        row
        for s in report["slices"].values()
        if s["what"] == "blocks" and s["threads"] == threads
        for row in s["rows"]
        if (row["what"], row["place"]) == (what, place) and name in row["seconds"]
    ]


def of_stream(row: dict[str, Any], name: str) -> float:
    """Bytes read and written a second, of the stream read in the same round."""
    return row["moved"] / row["read"] * ratio(row["seconds"], "stream read", name)


def targets(report: dict[str, Any]) -> Iterator[Target]:
    """What the project wants of its kernels, and what was found."""
    rows = matmul_rows(report)
    amx = "amx_bf16" in report["machine"]["flags"]
    threads = max((row.threads for row in rows), default=1)

    def at(m: int, large: bool | None = None, place: str | None = None) -> list[Row]:
        return [
            row
            for row in rows
            if row.m == m and (large is None or row.large == large) and (place is None or row.place == place)
        ]

    for what, least in (("quantize", 5.0), ("dequantize", 1.5)):
        cached = block_figures(report, what, "cache", 1, "ggml")
        found = [(ratio(row["seconds"], "ggml", "azquant"), "") for row in cached]
        yield Target(f"{what}, in cache, 1 thread", f"{least:g}x ggml", least, found)
    for name, note in (("azquant", "an array that is there"), ("azquant, new array", "a new array")):
        found = [
            (of_stream(row, name), "") for row in block_figures(report, "quantize", "memory", threads, name)
        ]
        work = f"quantize from memory into {note}, {threads} threads"
        yield Target(work, "85% of stream read", 0.85, found, "%")
    for place in ("cache", "memory"):
        found = [(ratio(row.seconds, "stream read", OURS), where(row)) for row in at(1, True, place)]
        yield Target(f"M = 1, large, weights in {place}", "90% of stream read", 0.9, found, "%")
    yield Target("M = 1, any shape", "1x the fastest peer", 1.0, against(at(1), OURS, PEERS))
    for m, limit in ((4, 1.35), (8, 1.9)):
        for place in ("cache", "memory"):
            found = [
                (ratio(row.seconds, OURS, "azquant auto, M = 1"), where(row)) for row in at(m, True, place)
            ]
            work = f"M = {m}, large, weights in {place}"
            yield Target(work, f"at most {limit}x M = 1", limit, found, most=True)
        yield Target(f"M = {m}, small", "1x the fastest peer", 1.0, against(at(m, False), OURS, PEERS))
    yield Target("M = 32", "1x the fastest peer", 1.0, against(at(32), OURS, PEERS))
    yield Target("M = 32", "2.8x ggml-AMX", 2.8 if amx else None, against(at(32), OURS, ["ggml"]))
    yield Target("M = 512", "6x ggml-AMX", 6.0 if amx else None, against(at(512), OURS, ["ggml"]))
    yield Target("M = 512", "2.2x OpenVINO", 2.2, against(at(512), OURS, ["OpenVINO int4"]))
    yield Target("M = 512", "1.7x torch bf16", 1.7, against(at(512), OURS, ["torch bf16"]))
    for large, share in ((True, 0.5), (False, 0.35)):
        found = [(row.of_peak(OURS + " bf16"), where(row)) for row in at(512, large) if amx]
        size = "large" if large else "small"
        yield Target(
            f"M = 512, {size}", f"{100 * share:.0f}% of the AMX bf16 peak", share if amx else None, found, "%"
        )
    vnni = "azquant avx512vnni"
    found = [(row.of_peak(vnni), where(row)) for row in at(512) if vnni in row.seconds and not amx]
    yield Target("avx512vnni, M = 512", "50% of the VNNI peak", None if amx else 0.5, found, "%")
    yield Target(
        "avx512vnni, M = 512", "1.7x ggml-AMX", 1.7 if amx else None, against(at(512), vnni, ["ggml"])
    )
    avx2, theirs = "azquant avx2", ["ggml AVX2 build"]
    yield Target("avx2, M = 512", "1.2x ggml built for AVX2", 1.2, against(at(512), avx2, theirs))
    found = [
        (
            max(ratio(row.seconds, "stream read", avx2) / 0.9, against([row], avx2, theirs)[0][0] / 1.2),
            where(row),
        )
        for row in at(1)
        if avx2 in row.seconds and theirs[0] in row.seconds
    ]
    yield Target(
        "avx2, M = 1", "1.2x ggml built for AVX2, or 90% of stream read; share of the nearer", 1.0, found
    )
    scaled = [
        (
            ratio(row["seconds"], f"{OURS}, 1", f"{OURS}, 2"),
            f"{s['n']} x {s['k']}, M = {row['m']}, {row['weights']}",
        )
        for s in report["slices"].values()
        if s["what"] == "scaling" and s["threads"] == 2
        for row in s["rows"]
    ]
    yield Target("2 threads against 1, large, M = 1 and 512", "1.85x", 1.85, scaled)


# ---- the page ----------------------------------------------------------------------------------------


def rate(seconds: dict[str, list[float]], name: str, amount: float) -> float:
    """Amount a second, the median."""
    return amount / statistics.median(seconds[name])


def matmul_table(rows: list[Row]) -> list[str]:
    """Microseconds by M, shape and name."""
    names = [name for name in dict.fromkeys(n for row in rows for n in row.seconds) if name not in PROBES]
    lines = [
        "| M | N x K | " + " | ".join(names) + " | fastest peer | of limit |",
        "|" + "---|" * (len(names) + 4),
    ]
    for row in sorted(rows, key=lambda row: row.m):
        cells = [f"{statistics.median(row.seconds[n]) * 1e6:.0f}" if n in row.seconds else "" for n in names]
        nearest = against([row], OURS, PEERS)
        peer = f"{nearest[0][0]:.2f}x" if nearest else ""
        limit = ratio(row.seconds, "stream read", OURS) if row.m == 1 else row.of_peak(row.chosen)
        lines.append(
            f"| {row.m} | {row.n} x {row.k} | " + " | ".join(cells) + f" | {peer} | {100 * limit:.0f}% |"
        )
    return lines


def limits_lines(rows: list[Row]) -> Iterator[str]:
    """What the machine could do while these were measured."""
    for n, k in dict.fromkeys((row.n, row.k) for row in rows):
        some = [row for row in rows if (row.n, row.k) == (n, k)]
        read = statistics.median(rate(row.seconds, "stream read", row.nbytes) for row in some) / 1e9
        peaks = ""
        for kind in ("peak int8", "peak bf16"):
            if kind in some[0].seconds:
                rates = [rate(row.seconds, kind, row.peak_macs[kind]) for row in some]
                peaks += f", {kind} {statistics.median(rates) / 1e9:.0f} GMAC/s"
        yield f"- {n} x {k}, {some[0].nbytes / 1e6:.1f} MB of blocks: stream read {read:.1f} GB/s{peaks}"


def blocks_lines(report: dict[str, Any]) -> Iterator[str]:
    """Quantize and dequantize."""
    yield from ("", "## Quantize and dequantize", "")
    yield "GB/s of bytes read and written; in brackets, of the stream read in the same rounds."
    for s in report["slices"].values():
        if s["what"] != "blocks":
            continue
        names = [
            n for n in dict.fromkeys(n for row in s["rows"] for n in row["seconds"]) if n != "stream read"
        ]
        yield from ("", f"{s['threads']} thread(s)", "", "| | " + " | ".join(names) + " | stream read |")
        yield "|" + "---|" * (len(names) + 2)
        for row in s["rows"]:
            cells = [
                f"{rate(row['seconds'], n, row['moved']) / 1e9:.1f} ({100 * of_stream(row, n):.0f}%)"
                if n in row["seconds"]
                else ""
                for n in names
            ]
            read = rate(row["seconds"], "stream read", row["read"]) / 1e9
            yield f"| {row['what']}, {row['place']} | " + " | ".join(cells) + f" | {read:.1f} |"


def scaling_lines(report: dict[str, Any]) -> Iterator[str]:
    """All threads against one."""
    found = [s for s in report["slices"].values() if s["what"] == "scaling"]
    if not found:
        return
    yield from (
        "",
        "## Threads",
        "",
        "| M | N x K | weights | threads | azquant | stream read |",
        "|---|---|---|---|---|---|",
    )
    for s in found:
        for row in s["rows"]:
            shown = [
                f"{ratio(row['seconds'], name + ', 1', name + ', ' + str(s['threads'])):.2f}x"
                for name in (OURS, "stream read")
            ]
            place = f"| {row['m']} | {s['n']} x {s['k']} | {row['weights']} | {s['threads']} against 1"
            yield f"{place} | {shown[0]} | {shown[1]} |"
    yield from (
        "",
        "M = 1 reads and does little else: more threads help it as much as they help the stream read.",
    )


def markdown(report: dict[str, Any]) -> str:
    """The page."""
    head, rows = report["machine"], matmul_rows(report)
    dates = sorted(s["date"] for s in report["slices"].values())
    lines = [
        "# Q4_0: azquant and its peers",
        "",
        f"`make bench-peers` (`python benchmarks/compare_matmul.py`) on {machine.line(head)}. Measured "
        f"{dates[0]} to {dates[-1]} UTC in {len(report['slices'])} slices.",
        "",
        "Times are medians; everyone took turns in short bursts, and ratios are medians of ratios within a "
        "round. The limits (a stream read of the same bytes, multiply-adds out of registers) took turns too. "
        '"Large" is 4096 x 4096 and 11008 x 4096. The first figure of a range is the worst. Libraries whose '
        "threads spin at barriers (ggml) stand still for milliseconds when anything else wants a processor: "
        "such rows tell of the machine, not of them.",
        "",
        "| work | goal | measured | |",
        "|---|---|---|---|",
        *(target.line() for target in targets(report)),
    ]
    for threads, place in dict.fromkeys((row.threads, row.place) for row in rows):
        some = [row for row in rows if (row.threads, row.place) == (threads, place)]
        chosen = ", ".join(dict.fromkeys(row.chosen.removeprefix("azquant ") for row in some))
        lines += [
            "",
            f"## Matmul, {threads} thread(s), weights in {place}",
            "",
            f"Microseconds. `auto` chose {chosen}; the last two columns: the fastest peer's time by auto's, "
            "auto's share of the stream read (M = 1) or of the peak.",
            "",
        ]
        lines += [*matmul_table(some), "", *limits_lines(some)]
    lines += [*scaling_lines(report), *blocks_lines(report)]
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Time relative to ours, by M, weights in cache: a row of pictures for each number of threads."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return
    rows = [row for row in matmul_rows(report) if row.place == "cache"]
    threads = sorted({row.threads for row in rows})
    shapes = list(dict.fromkeys((row.n, row.k) for row in rows))
    if not shapes:
        return
    size = (3.6 * len(shapes) + 2, 3.4 * len(threads))
    figure, axes = plt.subplots(
        len(threads), len(shapes), figsize=size, sharex=True, sharey=True, squeeze=False
    )
    names = [name for name in dict.fromkeys(n for row in rows for n in row.seconds) if name not in PROBES]
    colours = dict(zip(names, plt.colormaps["tab20"].colors, strict=False))
    ms = sorted({row.m for row in rows})
    for (i, number), (j, shape) in itertools.product(enumerate(threads), enumerate(shapes)):
        axis = axes[i][j]
        some = [row for row in rows if row.threads == number and (row.n, row.k) == shape]
        for name in names:
            points = [(row.m, ratio(row.seconds, name, OURS)) for row in some if name in row.seconds]
            if points:
                width = 2.5 if name == OURS else 1
                line = zip(*points, strict=True)
                axis.plot(*line, marker=".", label=name, color=colours[name], linewidth=width)
        axis.set(xscale="log", yscale="log", ylim=(0.7, 30))
        axis.set_title(f"N = {shape[0]}, K = {shape[1]}, {number} thr.", fontsize=9)
        axis.set_xticks(ms, [str(m) for m in ms])
        axis.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
        axis.minorticks_off()
        axis.grid(True, alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("rows of x (M)")
    for row_axes in axes:
        row_axes[0].set_ylabel("time, azquant auto = 1")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="center right", fontsize=8)
    figure.suptitle("Q4_0 matmul, weights in cache: lower is faster", fontsize=11)
    figure.tight_layout(rect=(0, 0, 1 - 1.9 / size[0], 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)
