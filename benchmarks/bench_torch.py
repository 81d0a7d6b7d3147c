"""azquant.torch beside PyTorch's own layers: one linear layer, the cost of a call, a whole GPT-2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import azquant as aq  # noqa: E402
from azquant import cpu  # noqa: E402
from azquant.torch import QuantLinear, quantize_  # noqa: E402

SHAPES = [(4096, 4096), (768, 3072)]
GROUP = 32


@pytest.fixture(autouse=True)
def inference(request: pytest.FixtureRequest) -> Iterator[None]:
    """Inference mode, and as many threads for torch as for azquant."""
    threads = request.config.getoption("--threads") or cpu.default_threads()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def int4pack(weight: Any, m: int) -> Callable[[Any], Any]:
    """torch's own 4-bit product: bf16 activations, a scale and a zero point per 32 weights."""
    n, k = weight.shape
    groups = weight.reshape(n, k // GROUP, GROUP)
    scale = groups.abs().amax(2).clamp(min=1e-6) / 7
    q = (groups / scale[:, :, None]).round().clamp(-8, 7).add(8).to(torch.int32).reshape(n, k)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    scales = torch.stack([scale.T, torch.zeros_like(scale.T)], 2).to(torch.bfloat16).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales)


def layer(kind: str, weight: Any, m: int) -> tuple[Callable[[Any], Any], Any]:
    """A product with the weight (n, k), and its input."""
    n, k = weight.shape
    x = torch.randn(m, k)
    dense = torch.nn.Linear(k, n, bias=False)
    dense.weight = torch.nn.Parameter(weight)
    if kind == "azquant":
        return QuantLinear.from_linear(dense), x
    if kind == "azquant bf16 in":
        return QuantLinear.from_linear(dense), x.bfloat16()
    if kind == "int4pack":
        return int4pack(weight, m), x.bfloat16()
    return (dense, x) if kind == "fp32" else (dense.bfloat16(), x.bfloat16())


@pytest.mark.parametrize("m", [1, 4, 32, 512])
@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("kind", ["azquant", "azquant bf16 in", "int4pack", "bf16", "fp32"])
def bench_linear(
    benchmark: Any, measure: Callable[..., Any], kind: str, shape: tuple[int, int], m: int
) -> None:
    benchmark.group = f"torch linear M={m} {shape[0]}x{shape[1]}"
    benchmark._min_rounds, benchmark._max_time = 5, 0.4
    torch.manual_seed(0)
    call, x = layer(kind, torch.randn(shape) * 0.02, m)
    measure(lambda: call(x), ops=2 * m * shape[0] * shape[1])


@pytest.mark.parametrize("kind", ["aq.matmul", "QuantLinear", "nn.Linear"])
def bench_call(benchmark: Any, measure: Callable[..., Any], kind: str) -> None:
    """What a call costs beside its arithmetic: QuantLinear less aq.matmul."""
    benchmark.group = "torch call, M=1 64x64"
    benchmark._max_time = 0.5
    q = aq.quantize(np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)).pack()
    x = torch.randn(1, 64)
    array, module = x.numpy(), QuantLinear.from_qtensor(q)
    dense = torch.nn.Linear(64, 64, bias=False)
    calls: dict[str, Callable[[], Any]] = {
        "aq.matmul": lambda: aq.matmul(array, q),
        "QuantLinear": lambda: module(x),
        "nn.Linear": lambda: dense(x),
    }
    measure(calls[kind])


@pytest.mark.parametrize("kind", ["fp32", "bf16", "q4_0", "q4_0 head q4_0", "q4_0 head q8_0"])
def bench_generate(benchmark: Any, measure: Callable[..., Any], kind: str) -> None:
    """32 tokens after a prompt of 32, by transformers: GPT-2 of 768/12/12, vocabulary 32000, tied head."""
    transformers = pytest.importorskip("transformers")
    benchmark.group = "torch generate, GPT-2 768/12/12"
    benchmark._min_rounds, benchmark._max_time = 2, 4
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=32000, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    if kind == "bf16":
        model = model.bfloat16()
    elif kind != "fp32":
        report = quantize_(model, head=kind.split()[-1] if "head" in kind else None)
        benchmark.extra_info["memory ratio"] = round(report.after / report.before, 4)
    prompt = torch.arange(32)[None]
    options = {"min_new_tokens": 32, "max_new_tokens": 32, "do_sample": False, "pad_token_id": 0}
    measure(lambda: model.generate(prompt, **options))
