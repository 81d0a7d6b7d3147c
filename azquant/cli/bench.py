"""``azquant bench``: how fast a GGUF model runs on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from azquant.cli.console import print_json, print_table, say, show_bytes, visible
from azquant.cli.guard import Verb
from azquant.cli.model_file import MODEL_FILE, store_option
from azquant.errors import ArgumentError

if TYPE_CHECKING:
    from azquant.evaluate.bench import BenchReport
    from azquant.evaluate.profile import StepProfile

__all__ = ["bench"]


@click.command(
    cls=Verb,
    short_help="Measure a GGUF model's speed.",
    epilog="""\b
Examples:
  azquant bench az-llm-q4_0.gguf
  azquant bench az-llm:v1.0 --batch 1 --batch 8 --threads 2 --json
  azquant bench az-llm-q4_0.gguf --compare llama.cpp/build/bin/llama-bench
  azquant bench az-llm-q4_0.gguf --profile --batch 1
""",
)
@click.argument("model", type=MODEL_FILE)
@store_option
@click.option("--prompt-tokens", type=int, default=512, show_default=True, help="Length of the prompt.")
@click.option("--answer-tokens", type=int, default=128, show_default=True, help="Length of the answers.")
@click.option("--batch", type=int, multiple=True, help="Answers at once, repeatable.  [default: 1, 4, 16]")
@click.option("--repeats", type=int, default=5, show_default=True, help="Runs of each; the median counts.")
@click.option("--threads", type=int, help="Threads to use.  [default: the processors available]")
@click.option(
    "--kv-type",
    type=click.Choice(["f16", "f32", "q8_0"]),
    default="f16",
    show_default=True,
    help="Type of the KV cache.",
)
@click.option(
    "--compare",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A llama-bench program; it runs in turn with azquant.",
)
@click.option("--profile", "by_op", is_flag=True, help="Show instead where the time of a step goes.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def bench(
    model: Path,
    prompt_tokens: int,
    answer_tokens: int,
    batch: tuple[int, ...],
    repeats: int,
    threads: int | None,
    kv_type: str,
    compare: Path | None,
    by_op: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure prefill, decode and batches of the GGUF MODEL with random tokens.

    "of limit" is what memory allows: a decode step must read all weights once, at the bandwidth that is
    measured in the same run on a buffer of that size.
    """
    import azquant
    from azquant.evaluate.bench import benchmark

    if threads is not None:
        azquant.set_num_threads(threads)

    def progress(what: str) -> None:
        if not quiet:
            say(None, f"measuring {what} ...")

    options: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "answer_tokens": answer_tokens,
        "kv_type": kv_type,
    }
    if by_op:
        if compare is not None:
            raise ArgumentError("--profile measures azquant alone; leave --compare out")
        from azquant.evaluate.profile import profile

        profiles = profile(model, **options, batches=batch or (1, 16), repeats=repeats)
        if as_json:
            print_json([asdict(found) for found in profiles])
        else:
            _print_profiles(profiles)
        return
    rounds = 1 if compare is None else repeats
    per_round = repeats if compare is None else 1
    reports, theirs = [], []
    for _ in range(rounds):
        reports.append(
            benchmark(model, **options, batches=batch or (1, 4, 16), repeats=per_round, progress=progress)
        )
        if compare is not None:
            progress(compare.name)
            theirs.append(_llama_bench(compare, model, reports[-1]))
    if as_json:
        print_json({"runs": [report.as_dict() for report in reports], "llama_bench": theirs})
    else:
        _print(reports, theirs)


def _print_profiles(profiles: list[StepProfile]) -> None:
    for found in profiles:
        left = found.seconds - sum(op.seconds for op in found.ops)
        rows = [(op.name, str(op.count), op.seconds) for op in found.ops] + [("between the ops", "", left)]
        print_table(
            [found.name, "ops", "ms", "share"],
            [[name, n, f"{1e3 * s:.3f}", f"{100 * s / found.seconds:.1f}%"] for name, n, s in rows]
            + [["all", "", f"{1e3 * found.seconds:.3f}", ""]],
        )


def _llama_bench(program: Path, model: Path, report: BenchReport) -> dict[str, float]:
    """Tokens per second of llama-bench for the prompt and the single answer, by our rows' names."""
    prompt, answer = report.rows[0].tokens, next(row.tokens for row in report.rows[1:])
    command = [
        str(program),
        "-m",
        str(model),
        "-t",
        str(report.threads),
        "-p",
        str(prompt),
        "-n",
        str(answer),
    ]
    import subprocess  # a few milliseconds that no other verb pays, nor this one alone

    try:
        done = subprocess.run(
            [*command, "-r", "1", "-o", "json"], capture_output=True, text=True, check=True, timeout=600
        )
        found = json.loads(done.stdout[done.stdout.index("[") :])
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ArgumentError(f"{program} did not measure the model: {error}") from None
    return {
        (f"pp{run['n_prompt']}" if run["n_prompt"] else f"tg{run['n_gen']}"): run["avg_ts"] for run in found
    }


def _print(reports: list[BenchReport], theirs: list[dict[str, float]]) -> None:
    from statistics import median

    last = reports[-1]
    rows = []
    for i, row in enumerate(last.rows):
        rate = median(report.rows[i].tokens_per_second for report in reports)
        samples = [sample for report in reports for sample in report.rows[i].samples]
        limit = (
            ""
            if row.percent_of_limit is None
            else f"{row.percent_of_limit * rate / row.tokens_per_second:.0f}%"
        )
        line = [row.name, f"{rate:,.0f}", f"{min(samples):,.0f} to {max(samples):,.0f}", limit]
        if theirs:
            peer = [run[row.name] for run in theirs if row.name in run]
            line += [f"{median(peer):,.0f}", f"{rate / median(peer):.2f}"] if peer else ["", ""]
        rows.append(line)
    head = ["", "tokens/s", "spread", "of limit"] + (["llama-bench", "ratio"] if theirs else [])
    print_table(head, rows)
    peak = "unknown" if last.peak_rss_bytes is None else show_bytes(last.peak_rss_bytes)
    same = ", ".join(f"{seconds * 1e3:.0f}" for seconds in last.same_request)
    print_table(
        ("", ""),
        [
            ["model", visible(Path(last.path).name)],
            ["kernels", f"{last.isa}, {last.threads} threads"],
            ["load", f"{last.load_seconds * 1e3:.0f} ms"],
            ["memory stated", _stated(last)],
            ["peak memory", peak],
            ["a step reads", f"{show_bytes(last.bytes_per_step)} at {last.stream_read / 1e9:.0f} GB/s"],
            ["the same request", f"{same} ms"],
        ],
    )


def _stated(report: BenchReport) -> str:
    needs = report.memory
    cache = f"{show_bytes(needs.cache_per_sequence)} for each of {needs.n_seq} sequences"
    return f"weights {show_bytes(needs.weights)}, KV cache {cache}, buffers {show_bytes(needs.work)}"
