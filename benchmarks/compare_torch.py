"""azquant.torch against PyTorch's own layers, interleaved in one run: JSON and a page.

    python benchmarks/compare_torch.py [--quick] [--threads N] [--out benchmarks/results]

One linear layer (fp32, bf16, torch's int4pack, torchao's int4 where it is installed), what a call costs, the
memory of the layers, and transformers' GPT-2 generating, all under inference_mode. "after gelu" is a layer as
it stands in a model, behind an operator that wakes PyTorch's own threads; its time includes that operator.
Every figure is the median over rounds in which all took their turn, each in a short burst.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compare_matmul
import machine
import numpy as np
import torch

import azquant as aq
from azquant import _native
from azquant.torch import QuantLinear, quantize_

SHAPES = ((4096, 4096), (768, 3072))  # (N, K)
ROWS = (1, 4, 32, 512)
GROUP = 32  # weights to a scale, everywhere
OURS = "QuantLinear"
FP32 = "nn.Linear fp32"
BF16 = "nn.Linear bf16"
INT4PACK = "torch int4pack"
TORCHAO = "torchao int4"

Call = Callable[[Any], Any]


# ---- one layer ---------------------------------------------------------------------------------------


def dense(weight: torch.Tensor, dtype: torch.dtype) -> torch.nn.Linear:
    """A linear layer of the weight (n, k)."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
    return layer.eval()


def int4pack(weight: torch.Tensor) -> Call:
    """torch's own 4-bit product: bf16 activations, a scale and a zero point per 32 weights."""
    n, k = weight.shape
    groups = weight.reshape(n, k // GROUP, GROUP)
    scale = groups.abs().amax(2).clamp(min=1e-6) / 7
    q = (groups / scale[:, :, None]).round().clamp(-8, 7).add(8).to(torch.int32).reshape(n, k)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    scales = torch.stack([scale.T, torch.zeros_like(scale.T)], 2).to(torch.bfloat16).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales)


def torchao_int4(weight: torch.Tensor) -> Call | str:
    """torchao's weight-only int4 for CPUs, or why there is none.

    Its int8-activation int4 (DA8W4) needs a kernel, torchao::da8w4_linear_cpu, that the wheels of PyPI do not
    hold. torch.compile puts the same kernel behind a layer, and gains nothing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
            from torchao.quantization import quantize_ as torchao_quantize_
    except ImportError as error:
        return f"not measured: {error}"
    layer = torch.nn.Sequential(dense(weight, torch.bfloat16))
    try:
        torchao_quantize_(layer, PrototypeInt4WeightOnlyConfig(GROUP, set_inductor_config=False))
    except Exception as error:
        return f"not measured: {error}"
    return layer[0]


def da8w4() -> str:
    """What torchao says of its kernel for int8 activations and int4 weights."""
    try:
        import torchao.prototype.quantization.int4  # noqa: F401

        dump = torch._C._dispatch_dump("torchao::da8w4_linear_cpu")
    except (ImportError, RuntimeError) as error:
        return f"missing ({error})"
    return "there" if "CPU" in dump else "missing from the installed torchao (no CPU kernel is registered)"


def layers(weight: torch.Tensor, m: int) -> dict[str, Callable[[], Any]]:
    """Name to one call, each on its own kind of input."""
    x = torch.randn(m, weight.shape[1])
    half = x.bfloat16()
    fp32 = dense(weight, torch.float32)
    ours = QuantLinear.from_linear(fp32)
    found: dict[str, tuple[Call, torch.Tensor]] = {
        OURS: (ours, x),
        f"{OURS}, bf16 in": (QuantLinear.from_linear(fp32), half),
        f"{OURS} after gelu": (lambda x: ours(torch.nn.functional.gelu(x)), x),
        f"{FP32} after gelu": (lambda x: fp32(torch.nn.functional.gelu(x)), x),
        FP32: (fp32, x),
        BF16: (dense(weight, torch.bfloat16), half),
        INT4PACK: (int4pack(weight), half),
    }
    other = torchao_int4(weight)
    if not isinstance(other, str):
        found[TORCHAO] = other, half
    return {name: lambda call=call, x=x: call(x) for name, (call, x) in found.items()}


def in_turn(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median seconds of each, over as many rounds as ``seconds`` for each have room for."""
    rounds = max(3, round(seconds / compare_matmul.BURST))
    return {name: statistics.median(times) for name, times in compare_matmul.in_turn(calls, rounds).items()}


def linear_rows(seconds: float) -> list[dict[str, Any]]:
    """Every shape and M."""
    rows = []
    for n, k in SHAPES:
        weight = torch.randn(n, k) * 0.02
        for m in ROWS:
            medians = in_turn(layers(weight, m), seconds)
            for name, value in medians.items():
                ratio = value / medians[OURS]
                rows.append(
                    {"m": m, "n": n, "k": k, "name": name, "microseconds": value * 1e6, "times_ours": ratio}
                )
                print(f"{m:4} {n:5} {k:5} {name:22} {value * 1e6:10.1f} us  x{ratio:.2f}", flush=True)
    return rows


# ---- what a call costs ---------------------------------------------------------------------------------


def call_costs(seconds: float) -> dict[str, float]:
    """Microseconds of a product so small (M = 1, 64 x 64) that it is nearly all call; one thread."""
    q = aq.quantize(np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)).pack()
    x = torch.randn(1, 64)
    array, y = x.numpy(), np.empty((1, 64), np.float32)
    ffi, lib = _native.ffi, _native.lib
    handle, x_at, y_at = q.matrix.handle, ffi.from_buffer("float[]", array), ffi.from_buffer("float[]", y)
    module, half = QuantLinear.from_qtensor(q), x.bfloat16()
    linear = dense(torch.randn(64, 64), torch.float32)
    many = 200  # calls to a reading of the clock

    def repeat(call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(many):
                call()

        return run

    calls = {
        "azq_matmul (C)": repeat(lambda: lib.azq_matmul(handle, x_at, 1, 64, y_at, 64, 0)),
        "aq.matmul": repeat(lambda: aq.matmul(array, q)),
        OURS: repeat(lambda: module(x)),
        f"{OURS}, bf16 in": repeat(lambda: module(half)),
        FP32: repeat(lambda: linear(x)),
    }
    before = torch.get_num_threads(), aq.cpu.num_threads()
    torch.set_num_threads(1)
    aq.set_num_threads(1)
    found = {name: value / many * 1e6 for name, value in in_turn(calls, seconds).items()}
    torch.set_num_threads(before[0])
    aq.set_num_threads(before[1])
    for name, value in found.items():
        print(f"call {name:22} {value:10.2f} us", flush=True)
    return found


# ---- a whole model -------------------------------------------------------------------------------------


def gpt2() -> Any:
    """GPT-2 of 134M parameters: 768/12/12, vocabulary 32000, 1024 positions, a head of its own."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32000, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False
    )
    return transformers.GPT2LMHeadModel(config).eval()


def generating(rounds: int, new_tokens: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Tokens per second after a prompt of 32, and the memory of the quantized layers."""
    models = {"fp32": gpt2(), "bf16": gpt2().bfloat16(), "q4_0": gpt2(), "q4_0, head q4_0": gpt2()}
    quantize_(models["q4_0"])
    report = quantize_(models["q4_0, head q4_0"], head="q4_0")
    prompt = torch.arange(32)[None]
    options = {
        "min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0
    }  # fmt: skip
    calls = {name: lambda model=model: model.generate(prompt, **options) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = []
    for name, value in medians.items():
        row = {"model": name, "tokens_per_second": new_tokens / value, "speedup": medians["fp32"] / value}
        rows.append(row)
        print(f"generate {name:18} {new_tokens / value:8.1f} tokens/s  {row['speedup']:.2f}x", flush=True)
    return rows, {"before": report.before, "after": report.after, "layers": len(report.replaced)}


# ---- the report ----------------------------------------------------------------------------------------


def targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal, what was found, and whether it is reached."""
    rows = report["linear"]

    def times(name: str, at: tuple[int, ...] = ROWS) -> list[float]:
        return [row["times_ours"] for row in rows if row["name"] == name and row["m"] in at]

    goals = [("M = 1: times as fast as nn.Linear fp32", 5.0, min(times(FP32, (1,))))]
    for name in (INT4PACK, TORCHAO, BF16):
        for m in ROWS:
            if times(name, (m,)):
                goals.append((f"M = {m}: times as fast as {name}", 1.0, min(times(name, (m,)))))
    goals.append(
        ("GPT-2 134M generates, times fp32", 2.0, max(row["speedup"] for row in report["generate"][2:]))
    )
    found = [{"goal": goal, "wanted": f">= {x:g}", "found": y, "met": y >= x} for goal, x, y in goals]
    cost = report["call"][OURS] - report["call"]["aq.matmul"]
    found.append(
        {"goal": "a call, microseconds over aq.matmul", "wanted": "<= 12", "found": cost, "met": cost <= 12}
    )
    ratio = report["memory"]["after"] / report["memory"]["before"]
    found.append(
        {
            "goal": "bytes of the quantized layers, of fp32",
            "wanted": "<= 0.16",
            "found": ratio,
            "met": ratio <= 0.16,
        }
    )
    return found


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    head = report["machine"]
    lines = [
        "# azquant.torch and PyTorch's own layers",
        "",
        f"`python benchmarks/compare_torch.py` on {machine.line(head)}. {report['threads']} thread(s).",
        f"ISA of azquant: {head['isa']}. inference_mode; medians, interleaved. Weights to a scale: {GROUP}.",
        "",
        f"torchao: {report['torchao']}. Its DA8W4 kernel (int8 activations, int4 weights): "
        f"{report['da8w4']}.",
        "",
        "## Goals",
        "",
        "Of the two shapes the worse.",
        "",
        "| goal | wanted | found | |",
        "|---|---|---|---|",
    ]
    for row in report["targets"]:
        lines.append(
            f"| {row['goal']} | {row['wanted']} | {row['found']:.2f} | {'yes' if row['met'] else 'NO'} |"
        )
    names = list(dict.fromkeys(row["name"] for row in report["linear"]))
    lines += ["", "## One layer, microseconds", "", "| M | N x K | " + " | ".join(names) + " |"]
    lines.append("|" + "---|" * (len(names) + 2))
    for m, n, k in dict.fromkeys((row["m"], row["n"], row["k"]) for row in report["linear"]):
        cells = {row["name"]: row for row in report["linear"] if (row["m"], row["n"], row["k"]) == (m, n, k)}
        lines.append(
            f"| {m} | {n} x {k} | " + " | ".join(f"{cells[x]['microseconds']:.0f}" for x in names) + " |"
        )
    lines += ["", "## A call (M = 1, 64 x 64, one thread), microseconds", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in report["call"].items()]
    lines += ["", f"## transformers' GPT-2 134M, {report['new_tokens']} tokens after 32", ""]
    lines += ["| weights | tokens/s | times fp32 |", "|---|---|---|"]
    lines += [
        f"| {r['model']} | {r['tokens_per_second']:.1f} | {r['speedup']:.2f} |" for r in report["generate"]
    ]
    memory = report["memory"]
    lines += [
        "",
        f"Its {memory['layers']} quantized layers, head and embedding too, in q4_0: "
        f"{memory['before']:,} -> {memory['after']:,} bytes.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short rounds")
    parser.add_argument("--threads", type=int, default=aq.cpu.default_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    aq.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    quick = arguments.quick
    new_tokens = 8 if quick else 32
    with torch.inference_mode():
        other = torchao_int4(torch.randn(64, 64))
        report: dict[str, Any] = {
            "machine": machine.header(),
            "threads": arguments.threads,
            "torchao": other if isinstance(other, str) else "PrototypeInt4WeightOnlyConfig, bf16 activations",
            "da8w4": da8w4(),
            "new_tokens": new_tokens,
            "linear": linear_rows(0.1 if quick else 0.3),
            "call": call_costs(0.1 if quick else 0.4),
        }
        report["generate"], report["memory"] = generating(2 if quick else 5, new_tokens)
    report["targets"] = targets(report)
    for row in report["targets"]:
        print(f"{row['goal']:45} {row['wanted']:8} {row['found']:8.2f} {'yes' if row['met'] else 'NO'}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = "torch-" + machine.slug()
    (arguments.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / f"{name}.md").write_text(markdown(report))
    print(f"written: {arguments.out / name}.json, .md")


if __name__ == "__main__":
    main()
