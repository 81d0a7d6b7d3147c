"""Matmul, quantize and dequantize in Q4_0 against their peers, interleaved: JSON, tables and a plot.

    python benchmarks/compare_matmul.py                         # all that the JSON does not have yet
    python benchmarks/compare_matmul.py --only 2/cache --again  # slices by name, also those it has
    python benchmarks/compare_matmul.py --for 200               # begin none after 200 seconds; go on later
    python benchmarks/compare_matmul.py --list                  # their names; --render: measure nothing

A slice is some rows under the same circumstances, a minute or two in a process of its own: matmul by threads,
place of the weights and shape; blocks (quantize and dequantize) by threads; scaling, all threads against one.
Each is merged into the JSON when it is done. Within a slice everyone runs in turn, in short bursts, ROUNDS
times, and so does what the machine can do at best: a stream read of as many bytes, multiply-adds of int8 and
bf16. Ratios are medians of ratios within a round. AZQUANT_PEERS names the folder of build_peers.sh for ggml;
onnxruntime, OpenVINO and PyTorch take part when installed.

With weights in "cache" one matrix is multiplied by again and again; in "memory" everyone goes round copies
that fill four third-level caches, as a model does that is larger. Rows of azquant are named after an ISA and
mean int8 there, unless bf16 is said; "auto" is what a user gets.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import matmul_report
import numpy as np
import peers

import azquant as aq
from azquant import _native

SHAPES = ((4096, 4096), (11008, 4096), (3072, 768), (768, 3072))  # (N, K)
LARGE = SHAPES[:2]
ROWS = {"cache": (1, 4, 8, 32, 512), "memory": (1, 4, 8, 32)}
ROUNDS = 7
BURST = 0.03  # seconds, at least; and two calls
BLOCKS = {"cache": (64, 2048), "memory": (16384, 4096)}

Call = Callable[[], object]


def slices() -> list[str]:
    """Every slice's name."""
    processors = machine.header()["processors"]
    names = []
    for threads in sorted({1, processors}):
        names += [f"{threads}/cache/{n}x{k}" for n, k in SHAPES]
        names += [f"{threads}/memory/{n}x{k}" for n, k in LARGE]
        names.append(f"{threads}/blocks")
    if processors > 1:
        names += [f"{processors}/scaling/{n}x{k}" for n, k in LARGE]
    return names


def memory_bytes() -> int:
    """What weights in memory fill."""
    cache = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    kilobytes = int(cache.read_text().strip().rstrip("K")) if cache.exists() else 0
    return max(4 * kilobytes << 10, 128 << 20)


def in_turn(calls: dict[str, Call], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each, the median of a burst of calls for every round.

    The pause lets a library's threads go to sleep: spinning (OpenMP's, BLAS's), they slow down the next.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(0.02)
            call()  # wakes threads, fills caches
            end, burst = time.perf_counter() + BURST, []
            while not burst or time.perf_counter() < end:
                start = time.perf_counter()
                call()
                burst.append(time.perf_counter() - start)
            times[name].append(float(f"{statistics.median(burst):.4g}"))
    return times


def cycle(calls: list[Call]) -> Call:
    """One call out of one per copy."""
    endless = itertools.cycle(calls)
    return lambda: next(endless)()


# ---- what the machine can do --------------------------------------------------------------------------


def with_isa(isa: str, call: Call) -> Call:
    """The call on that ISA; nothing is switched that is on already."""

    def run() -> object:
        if aq.active_isa() != isa:
            aq.use_isa(isa)
        return call()

    return run


def stream(copies: int, nbytes: int) -> Call:
    """Reading as many bytes as one product does, from where its weights are."""
    buffer = np.ones(copies * nbytes, np.uint8)
    parts = [buffer[i * nbytes : (i + 1) * nbytes] for i in range(copies)]
    return cycle([lambda part=part: _native.stream_read(part) for part in parts])


def peaks(macs: dict[str, int]) -> dict[str, Call]:
    """Multiply-adds out of registers by the best ISA; ``macs`` gets how many a call does."""
    found: dict[str, Call] = {}
    for kind, work in (("int8", _native.peak_int8), ("bf16", _native.peak_bf16)):
        macs[f"peak {kind}"] = work(100_000)
        if macs[f"peak {kind}"]:
            found[f"peak {kind}"] = with_isa(aq.isas()[-1], lambda work=work: work(100_000))
    return found


# ---- matmul ------------------------------------------------------------------------------------------


def ours(weights: list[aq.QTensor], x: np.ndarray) -> dict[str, Call]:
    """azquant: what the user gets, every ISA's int8 and bf16, and NumPy."""
    found: dict[str, Call] = {}
    best, (m, _), (n, k) = aq.isas()[-1], x.shape, weights[0].shape

    def product(compute: str, isa: str) -> Call:
        return with_isa(isa, cycle([lambda q=q: aq.matmul(x, q, compute) for q in weights]))

    found["azquant auto"] = product("auto", best)
    for isa in reversed(aq.isas()[1:]):
        for compute in ("int8", "bf16"):
            aq.use_isa(isa)
            own = aq.cpu.choice(m, n, k, "q4_0", compute).isa == isa
            if own and (compute == "int8" or _native.peak_bf16(1)):
                found[matmul_report.name_of(isa, compute)] = product(compute, isa)
    if len(weights) == 1:
        multiply = peers.numpy_fallback(weights[0])
        found["azquant NumPy fallback"] = lambda: multiply(x)
    if m in (4, 8):
        one = x[:1]
        found["azquant auto, M = 1"] = with_isa(best, cycle([lambda q=q: aq.matmul(one, q) for q in weights]))
    aq.use_isa(best)
    return found


def libraries(dense: np.ndarray, copies: int, threads: int) -> dict[str, list[peers.Multiply]]:
    """The peers that take any M, one multiply per copy of the weights."""
    found = {}
    for name, make in (
        ("onnxruntime MatMulNBits", peers.onnxruntime_nbits),
        ("OpenVINO int4", peers.openvino_int4),
        ("torch bf16", peers.torch_bf16),
        ("torch int4pack", peers.torch_int4),
    ):
        made = [make(dense, threads) for _ in range(copies)]
        if made[0]:
            found[name] = [multiply for multiply in made if multiply]
    return found


def ggml_builds() -> dict[str, peers.Ggml]:
    """ggml as make peers built it, natively and for AVX2 alone."""
    folders = {"ggml": peers.ggml_folder(), "ggml AVX2 build": peers.ggml_folder("build-avx2")}
    return {name: peers.Ggml(folder) for name, folder in folders.items() if folder}


def measure_matmul(threads: int, place: str, n: int, k: int) -> dict[str, Any]:
    """A slice's rows: seconds of every round by M and name."""
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((n, k), dtype=np.float32)
    q = aq.quantize(dense).pack()
    copies = 1 if place == "cache" else memory_bytes() // q.nbytes + 1
    weights = [q, *(aq.QTensor(q.data.copy(), q.shape, q.type).pack() for _ in range(1, copies))]
    builds, others = ggml_builds(), libraries(dense, copies, threads)
    macs: dict[str, int] = {}
    probes = {"stream read": stream(copies, q.nbytes), **peaks(macs)}
    rows = []
    for m in ROWS[place]:
        x = rng.standard_normal((m, k), dtype=np.float32)
        calls = dict(ours(weights, x))
        for name, build in builds.items():
            loaded = [build.matmul(q.data, n, k, m, threads)[1] for _ in weights]
            calls[name] = cycle([lambda multiply=multiply, x=x: multiply(x) for multiply in loaded])
        for name, multiplies in others.items():
            calls[name] = cycle([lambda multiply=multiply, x=x: multiply(x) for multiply in multiplies])
        calls |= probes
        for call in calls.values():  # a peer may prepare each of its copies when it first meets it
            for _ in range(copies):
                call()
        aq.use_isa(aq.isas()[-1])
        chosen = matmul_report.name_of(*aq.cpu.choice(m, n, k)[::-1])
        rows.append({"m": m, "chosen": chosen, "seconds": in_turn(calls, ROUNDS if m < 512 else 5)})
        for build in builds.values():
            build.release()
    return {"n": n, "k": k, "nbytes": q.nbytes, "copies": copies, "peak_macs": macs, "rows": rows}


def measure_scaling(threads: int, n: int, k: int) -> dict[str, Any]:
    """One thread and all of them, in turn."""
    rng = np.random.default_rng(0)
    q = aq.quantize(rng.standard_normal((n, k), dtype=np.float32)).pack()
    copies = memory_bytes() // q.nbytes + 1
    weights = [q, *(aq.QTensor(q.data.copy(), q.shape, q.type).pack() for _ in range(1, copies))]
    rows = []
    for place, m in (("cache", 1), ("memory", 1), ("cache", 512)):
        x = rng.standard_normal((m, k), dtype=np.float32)
        used = weights[:1] if place == "cache" else weights
        calls = {}
        for number in (1, threads):
            matmul = cycle([lambda q=q, x=x: aq.matmul(x, q) for q in used])
            read = stream(len(used), q.nbytes)
            for name, call in (("azquant auto", matmul), ("stream read", read)):

                def run(number: int = number, call: Call = call) -> object:
                    aq.set_num_threads(number)
                    return call()

                calls[f"{name}, {number}"] = run
        rows.append({"m": m, "weights": place, "seconds": in_turn(calls, 2 * ROUNDS)})
    return {"n": n, "k": k, "rows": rows}


# ---- blocks ------------------------------------------------------------------------------------------


def measure_blocks(threads: int) -> dict[str, Any]:
    """Quantize and dequantize: in cache, and from memory into an array that is there and into a new one."""
    folder = peers.ggml_folder()
    base = peers.Ggml(folder).base if folder else None
    ffi, lib = _native.ffi, _native.lib
    rows = []
    for place, (n, k) in BLOCKS.items():
        some = (np.random.default_rng(0).standard_normal((64, k)) * 0.02).astype(np.float32)
        x = np.tile(some, (n // 64, 1))
        blocks, bad = np.zeros(aq.quantize(x).nbytes, np.uint8), ffi.new("int64_t *")
        values, q = np.zeros_like(x), aq.quantize(x)
        to, of = ffi.from_buffer("uint8_t[]", blocks), ffi.from_buffer("float[]", x)
        back = ffi.from_buffer("float[]", values)

        def kept(of: Any = of, n: int = n, k: int = k, to: Any = to, bad: Any = bad) -> object:
            return lib.azq_quantize(lib.AZQ_TYPE_Q4_0, of, n, k, to, bad)

        def unpacked(to: Any = to, n: int = n, k: int = k, back: Any = back) -> object:
            return lib.azq_dequantize(lib.AZQ_TYPE_Q4_0, to, n, k, back)

        for what, ours, new, theirs, arguments in (
            ("quantize", kept, lambda x=x: aq.quantize(x), "quantize_row_q4_0_ref", (x, blocks)),
            ("dequantize", unpacked, q.dequantize, "dequantize_row_q4_0", (blocks, values)),
        ):
            best = aq.isas()[-1]
            calls: dict[str, Call] = {"azquant": with_isa(best, ours)}
            if place == "memory":
                calls["azquant, new array"] = with_isa(best, new)
            calls |= {f"azquant {isa}": with_isa(isa, ours) for isa in reversed(aq.isas()[1:-1])}
            if base and threads == 1:  # these have no threads of their own
                function, addresses = getattr(base, theirs), [a.ctypes.data for a in arguments]
                calls["ggml"] = lambda f=function, a=addresses, size=x.size: f(*a, size)
            calls["stream read"] = with_isa(best, stream(1, x.nbytes))
            rows.append(
                {"what": what, "place": place, "read": x.nbytes, "moved": x.nbytes + blocks.nbytes}
                | {"seconds": in_turn(calls, 2 * ROUNDS)}
            )
            aq.use_isa(best)
    return {"rows": rows}


# ---- running -----------------------------------------------------------------------------------------


def measure(name: str) -> dict[str, Any]:
    """One slice."""
    threads, what, *shape = name.split("/")
    aq.set_num_threads(int(threads))
    head = {"threads": int(threads), "what": what, "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime())}
    if what == "blocks":
        return head | measure_blocks(int(threads))
    n, k = map(int, shape[0].split("x"))
    if what == "scaling":
        return head | measure_scaling(int(threads), n, k)
    return head | measure_matmul(int(threads), what, n, k)


def run_slice(name: str) -> dict[str, Any]:
    """One slice in a process of its own, whose OpenMP and BLAS have its number of threads."""
    variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(variables, name.split("/", 1)[0])}
    command = [sys.executable, __file__, "--measure", name]
    out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def write(report: dict[str, Any], path: Path) -> None:
    """JSON, then what is made of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, separators=(",", ":")).replace('"rows":', '\n"rows":') + "\n")
    temporary.replace(path)
    path.with_suffix(".md").write_text(matmul_report.markdown(report))
    matmul_report.plot(report, path.with_suffix(".png"))


def main() -> None:
    """Runs what is missing, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="slices whose name contains this")
    parser.add_argument("--again", action="store_true", help="also slices that the JSON has, oldest first")
    parser.add_argument(
        "--for", dest="seconds", type=float, default=float("inf"), help="begin none after so long"
    )
    parser.add_argument("--list", action="store_true", help="print the slices' names, + those the JSON has")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument(
        "--measure", metavar="SLICE", help="this slice alone, its JSON on the standard output"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    path = arguments.out / f"matmul-{machine.slug()}.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if "slices" not in report:
        report = {"slices": {}}
    wanted = [name for name in slices() if arguments.only in name]
    if arguments.list:
        print("\n".join(f"{'+' if name in report['slices'] else ' '} {name}" for name in wanted))
        return
    if arguments.again:  # the oldest first: what --for cut short goes on where it was
        wanted.sort(key=lambda name: report["slices"].get(name, {}).get("date", ""))
    start = time.monotonic()
    for name in () if arguments.render else wanted:
        if name in report["slices"] and not arguments.again:
            continue
        if time.monotonic() - start > arguments.seconds:
            print("time is up; run again to go on")
            break
        begun = time.monotonic()
        report["slices"][name] = run_slice(name)
        report["machine"] = machine.header()
        write(report, path)
        print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)
    if not report["slices"]:
        raise SystemExit(f"{path} has no slices to make tables of")
    write(report, path)
    print(f"written: {path.with_suffix('')}.json, .md, .png")


if __name__ == "__main__":
    main()
