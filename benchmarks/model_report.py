"""The tables and pictures of compare_models.py, and the targets that its figures are held against."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import machine

Report = dict[str, Any]

SMALL, MIDDLE, LARGE = ("gpt2-134m", "llama-134m"), ("gpt2-369m",), ("gpt2-1.0b", "tinyllama-1.1b")


def _targets(small: float, middle: float, large: float) -> dict[str, float]:
    return {
        name: value for names, value in ((SMALL, small), (MIDDLE, middle), (LARGE, large)) for name in names
    }


RATIOS = {
    "decode": _targets(2.2, 1.7, 1.2),
    "prefill": _targets(4.5, 5.0, 5.5),
    "batch": _targets(4.0, 4.0, 3.5),
}
"""Least times llama.cpp's tokens/s, set for processors with AMX."""
AVX2_RATIOS = {"decode": 1.3, "prefill": 1.3, "batch": 1.5}
PERCENT_OF_LIMIT = _targets(50, 60, 80)
LOAD_SECONDS = 0.25
"""Of SMALL models; and less than llama.cpp takes."""
MEMORY = (1.3, 120e6)
"""Most times the file's size, and bytes more, beside the KV cache."""

TITLES = {
    "decode": "Decode, one sequence (tg128), tokens/s",
    "prefill": "Prefill (pp512), tokens/s",
    "batch": "Decode, 16 sequences, tokens/s of all together",
    "load": "Load to first token, seconds of the whole process",
    "memory": "Peak resident memory, 512 tokens in and 128 out, MB",
}


class Table:
    """The records of one metric, by model and contender."""

    def __init__(self, report: Report, metric: str) -> None:
        self.metric = metric
        self.rows: dict[str, dict[str, Any]] = {}
        for record in report["records"]:
            if record["metric"] == metric:
                self.rows.setdefault(record["model"], {})[record["contender"]] = record
        known = ["azquant", "azquant submit()", "azquant avx2", "azquant avx2 submit()", "azquant numpy"]
        known += ["llama.cpp", "llama.cpp avx2"]
        self.contenders = [name for name in known if any(name in row for row in self.rows.values())]

    def value(self, model: str, contender: str) -> float | None:
        """The figure, or ``None``."""
        record = self.rows.get(model, {}).get(contender)
        return None if record is None else float(record["value"])

    def ratio(self, model: str, ours: str, theirs: str) -> float | None:
        """Ours over theirs, if both are of the same run."""
        row = self.rows.get(model, {})
        if ours not in row or theirs not in row or row[ours]["run"] != row[theirs]["run"]:
            return None
        return float(row[ours]["value"] / row[theirs]["value"])


def _against(value: float | None, target: float, unit: str = "×", *, most: bool = False) -> str:
    """A figure beside its target; bold where it misses."""
    if value is None:
        return ""
    digits = 0 if unit == "%" else 2
    sign, good = ("≤", value <= target) if most else ("≥", value >= target)
    shown = f"{value:.{digits}f}{unit}"
    wanted = f"{sign} {target:g}{unit}"
    return f"{shown} ({wanted})" if good else f"**{shown} misses {wanted}**"


def _cells(table: Table, model: str) -> dict[str, str]:
    """The columns beside the figures: ratios and limits against their targets."""
    metric, row = table.metric, table.rows[model]
    cells: dict[str, str] = {}
    if metric in RATIOS:
        ratio = table.ratio(model, "azquant", "llama.cpp")
        cells["azquant / llama.cpp"] = _against(ratio, RATIOS[metric][model])
        ratio = table.ratio(model, "azquant avx2", "llama.cpp avx2")
        cells["avx2 / avx2"] = _against(ratio, AVX2_RATIOS[metric])
    if metric == "decode" and "azquant" in row:
        found = row["azquant"]
        percent = 100 * found["value"] * found["step_bytes"] / found["stream_read"]
        cells["of limit"] = _against(percent, PERCENT_OF_LIMIT[model], "%")
        cells["limit"] = f"{found['step_bytes'] / 1e6:.0f} MB at {found['stream_read'] / 1e9:.1f} GB/s"
    if metric == "load":
        ratio = table.ratio(model, "azquant", "llama.cpp")
        cells["azquant / llama.cpp"] = (
            _against(ratio, 1.0, most=True) if model in SMALL else f"{ratio or 0:.2f}×"
        )
        if model in SMALL:
            cells["target"] = _against(table.value(model, "azquant"), LOAD_SECONDS, " s", most=True)
    if metric == "memory" and "azquant" in row:
        found = row["azquant"]
        most = (MEMORY[0] * found["file_bytes"] + found["kv"] + MEMORY[1]) / 1e6
        cells["file"] = f"{found['file_bytes'] / 1e6:.0f}"
        cells["KV"] = f"{found['kv'] / 1e6:.0f}"
        good = found["value"] / 1e6 <= most
        cells["most allowed"] = f"{most:.0f}" if good else f"**misses {most:.0f}**"
    return cells


def _number(value: float | None, metric: str) -> str:
    if value is None:
        return ""
    if metric == "load":
        return f"{value:.3f}"
    if metric == "memory":
        return f"{value / 1e6:.0f}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _table(table: Table) -> list[str]:
    beside = {model: _cells(table, model) for model in table.rows}
    columns = list(dict.fromkeys(name for cells in beside.values() for name in cells))
    columns = [name for name in columns if any(cells.get(name) for cells in beside.values())]
    head = ["model", *table.contenders, *columns]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for model, cells in beside.items():
        shown = [_number(table.value(model, name), table.metric) for name in table.contenders]
        lines.append("| " + " | ".join([model, *shown, *(cells.get(name, "") for name in columns)]) + " |")
    return lines


def _positions(report: Report) -> list[str]:
    """How the time of a step grows over the context: a straight line through it, per contender."""
    lines = []
    for record in report["records"]:
        if record["metric"] != "positions":
            continue
        start, slope = line_of(record["at"], record["samples"])
        text = f"- {record['model']}, {record['contender']}: {start:.3f} ms"
        text += f" + {1e3 * slope:.3f} ms per 1000 tokens"
        if record.get("position_bytes"):
            reading = 1e3 * record["position_bytes"] / record["stream_read"]
            text += (
                f"; reading the cache alone, at the stream bandwidth: {1e3 * reading:.3f} ms per 1000 tokens"
            )
        lines.append(text)
    return lines


def line_of(x: list[float], y: list[float]) -> tuple[float, float]:
    """The line through the medians of 16 stretches: no outlier bends it."""
    step = max(1, len(x) // 16)
    xs = [statistics.median(x[i : i + step]) for i in range(0, len(x), step)]
    ys = [statistics.median(y[i : i + step]) for i in range(0, len(y), step)]
    slope, start = statistics.linear_regression(xs, ys)
    return start, slope


def markdown(report: Report) -> str:
    """The report as a page."""
    head = report["machine"]
    tables = [_table(table) for metric in TITLES if (table := Table(report, metric)).rows]
    titles = [TITLES[metric] for metric in TITLES if Table(report, metric).rows]
    missed = sum(line.count("misses") for lines in tables for line in lines)
    threads = sorted({record["threads"] for record in report["records"]})
    lines = [
        "# Whole models, Q4_0 (Q6_K head): azquant and llama.cpp",
        "",
        f"`make peers bench-model` on {machine.line(head)}; {', '.join(map(str, threads))} threads, "
        f"{head['isa']} kernels. "
        "Medians over rounds in which all contenders ran in turn; every ratio is of one run. Random weights, "
        "untied head, 32,000 tokens, 1024 positions, KV cache in F16. NumPy's rows are of short runs.",
        "",
        '"Of limit": the bytes of weights that a step reads, over the stream-read bandwidth measured in the '
        'same run on a buffer of that size. The cache is not counted. "submit()" adds to the model\'s steps '
        "what llama.cpp's figure does not hold: sampling, streams, threads.",
        "",
        f"In brackets: the target. {missed} cells miss theirs, in bold."
        if missed
        else "All cells meet targets.",
    ]
    if "amx_int8" not in head["flags"]:
        lines += [
            "",
            "**Not measurable here: every row of AMX kernels, azquant's and llama.cpp's.** This processor "
            "has none, and the targets for `azquant / llama.cpp` were set for both working with AMX.",
        ]
    for title, table in zip(titles, tables, strict=True):
        lines += ["", f"## {title}", "", *table]
    if positions := _positions(report):
        lines += ["", "## Time per token over the context", "", *positions]
    return "\n".join(lines) + "\n"


def plot(report: Report, stem: Path) -> None:
    """``stem``-speed.png: tokens/s beside llama.cpp's; ``stem``-positions.png: time over the context."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return
    tables = [table for table in (Table(report, metric) for metric in RATIOS) if table.rows]
    names = sorted({name for table in tables for name in table.contenders})
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    if tables:
        figure, axes = plt.subplots(1, len(tables), figsize=(5 * len(tables), 4.3), squeeze=False)
        for axis, table in zip(axes[0], tables, strict=True):
            against = all(table.value(model, "llama.cpp") for model in table.rows)
            models, width = list(table.rows), 0.8 / len(table.contenders)
            for i, name in enumerate(table.contenders):
                heights = [
                    (table.value(model, name) or 0)
                    / ((table.value(model, "llama.cpp") or 1) if against else 1)
                    for model in models
                ]
                at = [position + i * width for position in range(len(models))]
                axis.bar(at, heights, width, label=name, color=colors[name])
            ticks = [position + 0.4 - width / 2 for position in range(len(models))]
            axis.set_xticks(ticks, models, rotation=20, fontsize=8)
            unit = "tokens/s, llama.cpp = 1" if against else "tokens/s"
            axis.set(title=TITLES[table.metric].rsplit(",", 1)[0], ylabel=unit)
            axis.grid(True, axis="y", alpha=0.3)
        shown = {}
        for axis in axes[0]:
            for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
                shown.setdefault(name, handle)
        figure.tight_layout(rect=(0, 0.08, 1, 1))
        figure.legend(shown.values(), shown, loc="lower center", ncols=len(shown), fontsize=8, frameon=False)
        figure.savefig(stem.with_name(f"{stem.name}-speed.png"), dpi=110)
    records = [record for record in report["records"] if record["metric"] == "positions"]
    if records:
        models = list(dict.fromkeys(record["model"] for record in records))
        figure, axes = plt.subplots(1, len(models), figsize=(6 * len(models), 4), squeeze=False)
        for axis, model in zip(axes[0], models, strict=True):
            for record in (record for record in records if record["model"] == model):
                x, y = record["at"], record["samples"]
                if len(x) < 100:
                    axis.plot(x, y, marker="o", label=record["contender"])
                    continue
                axis.plot(x, y, ".", markersize=2, label=record["contender"])
                start, slope = line_of(x, y)
                line = axis.plot(
                    [x[0], x[-1]], [start + slope * x[0], start + slope * x[-1]], "k--", linewidth=1
                )
                line[0].set_label(f"{start:.2f} ms + {1e3 * slope:.2f} ms / 1000 tokens")
                axis.axhline(start, color="grey", linewidth=0.5)
            axis.set(title=model, xlabel="tokens in the cache", ylabel="ms per token", ylim=(0, None))
            axis.legend(fontsize=7)
            axis.grid(True, alpha=0.3)
        figure.tight_layout()
        figure.savefig(stem.with_name(f"{stem.name}-positions.png"), dpi=110)
