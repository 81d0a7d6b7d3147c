"""QuantLinear and QuantEmbedding as PyTorch's own machinery sees them; the oracle is nn.Linear on the
dequantized weights."""

from __future__ import annotations

import copy
import ctypes
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import azquant as aq  # noqa: E402
from azquant.errors import ArgumentError, DTypeError, ShapeError, UnsupportedTypeError  # noqa: E402
from azquant.torch import QuantEmbedding, QuantLinear  # noqa: E402

nn = torch.nn
Run = Callable[..., "subprocess.CompletedProcess[str]"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def linear(rows: int = 40, columns: int = 96, **options: Any) -> QuantLinear:
    torch.manual_seed(rows * columns)
    dense = nn.Linear(columns, rows)
    nn.init.normal_(dense.weight)
    return QuantLinear.from_linear(dense, **options)


def reference(layer: QuantLinear, x: Any) -> Any:
    """In float64 on the dequantized weights."""
    bias = None if layer.bias is None else layer.bias.detach().double()
    return nn.functional.linear(x.detach().double(), layer.dequantize().double(), bias)


def error(found: Any, expected: Any) -> float:
    return float((found.detach().double() - expected).norm() / expected.norm())


# ---- values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", ["q4_0", "q8_0", "f16", "bf16", "f32"])
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_fp32_is_within_the_bound_of_the_dequantized_linear(isa: str, type: str, rows: int) -> None:
    layer = linear(rows, 160, type=type, compute="fp32")
    x = torch.randn(7, 160)
    assert error(layer(x), reference(layer, x)) <= 1e-5


@pytest.mark.parametrize("type", ["q4_0", "q8_0"])
@pytest.mark.parametrize("m", [1, 4, 33])
def test_auto_is_within_the_bound(isa: str, type: str, m: int) -> None:
    layer = linear(72, 256, type=type)
    x = torch.randn(m, 256)
    assert error(layer(x), reference(layer, x)) <= 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0, 5), (2, 1, 2)])
def test_any_leading_shape_and_dtype(dtype: Any, lead: tuple[int, ...]) -> None:
    layer = linear(compute="fp32")
    x = torch.randn(*lead, 96).to(dtype)
    y = layer(x)
    assert y.dtype is dtype
    assert y.shape == (*lead, 40)
    torch.testing.assert_close(y, reference(layer, x.float()).to(dtype), rtol=1e-2, atol=1e-2)


def test_equals_the_numpy_interface_bit_for_bit() -> None:
    q = aq.quantize(np.random.default_rng(0).normal(size=(48, 64)).astype(np.float32))
    x = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    layer = QuantLinear.from_qtensor(q)
    for mode in aq.ops.COMPUTE_MODES:
        layer.compute = mode
        assert np.array_equal(layer(torch.from_numpy(x)).numpy(), aq.matmul(x, q, mode))


def test_inputs_that_are_not_contiguous() -> None:
    layer = linear(compute="fp32")
    x = torch.randn(96, 6).T
    assert torch.equal(layer(x), layer(x.contiguous()))
    assert torch.equal(layer(x[::2]), layer(x.contiguous()[::2]))


def test_non_finite_rows_give_nan_only_there() -> None:
    layer = linear()
    x = torch.randn(3, 96)
    x[1, 5] = float("inf")
    assert layer(x).isnan().any(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_rows_are_those_of_the_dequantized_table(isa: str, dtype: Any) -> None:
    table = nn.Embedding(50, 64, padding_idx=3).to(dtype)
    layer = QuantEmbedding.from_embedding(table)
    wanted = torch.tensor([[0, 49, 7], [7, 3, 16]])
    found = layer(wanted)
    assert found.dtype is dtype
    assert torch.equal(found, layer.dequantize()[wanted].to(dtype))
    assert torch.equal(layer(wanted.int()), found)
    assert layer.padding_idx == 3
    assert layer.half()(wanted).dtype is torch.float16


# ---- the bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", ["q4_0", "q8_0", "bf16"])
@pytest.mark.parametrize("rows", [1, 16, 50])
def test_the_weight_is_ggufs_bytes_and_only_one_form_is_kept(isa: str, type: str, rows: int) -> None:
    dense = nn.Linear(96, rows)
    q = aq.quantize(dense.weight.detach().float().numpy(), type)
    layer = QuantLinear.from_linear(dense, type)
    assert layer.weight.numpy().tobytes() == q.data.tobytes()
    assert layer.to_qtensor().data.tobytes() == q.data.tobytes()
    assert np.array_equal(layer.dequantize().numpy(), q.dequantize())
    held = [t for t in (*layer.buffers(), *layer.parameters()) if t is not layer.bias]
    assert held == [layer.packed]
    assert set(layer.state_dict()) == {"weight", "bias"}
    panels = -(-rows // 16) * 16 * q.type.row_bytes(96)
    assert layer.packed.nbytes <= panels + 64 * (rows // 16 + 1)


def test_q4_0_takes_a_seventh_of_the_memory() -> None:
    layer = QuantLinear(768, 3072, bias=False)
    assert layer.weight_nbytes <= 0.16 * 768 * 3072 * 4


def test_state_dict_round_trip_in_another_process(run_python: Run, tmp_path: Path) -> None:
    layer = linear()
    x = torch.randn(4, 96)
    torch.save({"state": layer.state_dict(), "x": x, "y": layer(x), "module": layer}, tmp_path / "file.pt")
    run_python(
        "import torch\n"
        "from azquant.torch import QuantLinear\n"
        f"saved = torch.load({str(tmp_path / 'file.pt')!r}, weights_only=False)\n"
        "layer = QuantLinear(96, 40)\n"
        "layer.load_state_dict(saved['state'])\n"
        "assert torch.equal(layer(saved['x']), saved['y'])\n"
        "assert torch.equal(saved['module'](saved['x']), saved['y'])\n"
        "assert torch.equal(saved['module'].weight, saved['state']['weight'])",
        check=True,
    )


def test_a_state_dict_is_safe_to_load_and_fits_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    layer, other = linear(), QuantLinear(96, 40)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other.weight, layer.weight)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    assert torch.equal(load_file(tmp_path / "layer.safetensors")["weight"], layer.weight)


def test_state_dicts_that_do_not_fit_are_refused() -> None:
    layer = linear()
    good, before = layer.state_dict(), layer.weight
    for weight, message in [
        (torch.randn(40, 96), "call quantize_"),
        (good["weight"][:, :-18], r"is torch.uint8 \(40, 54\)"),
        (torch.empty(40, 54, dtype=torch.uint8, device="meta"), "meta device"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict({**good, "weight": weight})
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"bias": good["bias"]})
    assert torch.equal(layer.weight, before)


def test_copies_and_pickles_are_equal_and_independent() -> None:
    layer = linear()
    x = torch.randn(2, 96)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert other.packed.data_ptr() != layer.packed.data_ptr()
    assert layer.weight.numpy().tobytes() in pickle.dumps(layer)


def test_tied_layers_stay_tied_through_copies_pickles_and_loading() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = QuantEmbedding.from_embedding(nn.Embedding(48, 64))
            self.head = QuantLinear(64, 48, bias=False)
            self.head.tie(self.wte)

        def forward(self, ids: Any) -> Any:
            return self.head(self.wte(ids))

    globals()["Model"] = Model  # for pickle
    Model.__qualname__ = "Model"
    model, ids = Model(), torch.arange(5)
    assert set(model.state_dict()) == {"wte.weight"}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.head.packed is other.wte.packed
        assert other.head.weight_nbytes == 0
        assert torch.equal(other(ids), model(ids))
        loaded = Model()
        loaded.load_state_dict(other.state_dict())
        assert torch.equal(loaded(ids), model(ids))
        assert loaded.bfloat16().head.packed is loaded.wte.packed


# ---- operators ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compute", ["auto", "fp32"])
def test_opcheck_is_clean(dtype: Any, compute: str) -> None:
    layer = linear()
    x = torch.randn(2, 3, 96).to(dtype).requires_grad_()
    arguments = (x, layer.packed, layer.bias, layer._type_id, 40, compute)
    torch.library.opcheck(torch.ops.azquant.linear.default, arguments)
    grad = torch.randn(2, 40).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.azquant.linear_backward.default, (grad, layer.packed, layer._type_id, 96))
    rows = (torch.tensor([[1, 2, 39]]), layer.packed, layer._type_id, 40, 96, dtype)
    torch.library.opcheck(torch.ops.azquant.embedding.default, rows)


@pytest.mark.parametrize("compute", ["auto", "fp32"])
def test_gradients_are_those_of_the_dequantized_linear(isa: str, compute: str) -> None:
    layer = linear(70, 160, compute=compute)
    x = torch.randn(2, 5, 160, requires_grad=True)
    dense = nn.Linear(160, 70)
    dense.weight.data, dense.bias.data = layer.dequantize(), layer.bias.detach().clone()
    grad = torch.randn(2, 5, 70)
    found = torch.autograd.grad(layer(x), (x, layer.bias), grad)
    expected = torch.autograd.grad(dense(x), (x, dense.bias), grad)
    for a, b in zip(found, expected, strict=True):
        assert error(a, b.double()) <= 1e-5


def test_second_derivatives() -> None:
    layer = linear(16, 32, compute="fp32")
    x = torch.randn(3, 32, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x)
    weight, bias = layer.dequantize(), layer.bias.detach()
    (expected,) = torch.autograd.grad(
        nn.functional.linear(x, weight, bias).pow(3).sum(), x, create_graph=True
    )
    (expected,) = torch.autograd.grad(expected.pow(2).sum(), x)
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-2)


def test_the_backward_takes_large_weights_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    from azquant.torch import functional

    layer = linear(70, 64)
    x = torch.randn(3, 64, requires_grad=True)
    (whole,) = torch.autograd.grad(layer(x).sum(), x)
    monkeypatch.setattr(functional, "_BAND_ELEMENTS", 64 * 11)
    (banded,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(banded, whole)


def test_the_weight_is_frozen_and_the_bias_is_not() -> None:
    layer = linear()
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    layer(torch.randn(2, 96)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((40,), 2.0))


class Block(nn.Module):
    """A linear layer among others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = QuantEmbedding.from_embedding(nn.Embedding(30, 64))
        self.up = linear(96, 64, compute="fp32")
        self.down = linear(64, 96, compute="fp32")

    def forward(self, ids: Any) -> Any:
        x = self.embed(ids)
        return x + self.down(nn.functional.gelu(self.up(x)))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore")  # torch's own, which differ between versions
def test_compiled_equals_eager(backend: str) -> None:
    if backend == "inductor" and sys.platform == "win32":
        pytest.skip("needs a C++ compiler")
    model = Block()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for count in (3, 8):
        ids = torch.arange(count) % 30
        with torch.inference_mode():
            torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_compiled_training_equals_eager() -> None:
    layer = linear(compute="fp32")
    x = torch.randn(4, 96, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x).square().sum(), x)
    expected = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore")
def test_exported_program_survives_a_file(tmp_path: Path) -> None:
    model, ids = Block().eval(), torch.arange(6)
    batch = torch.export.Dim("tokens", min=2, max=100)
    program = torch.export.export(model, (ids,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "block.pt2")
    loaded = torch.export.load(tmp_path / "block.pt2").module()
    with torch.no_grad():
        assert torch.equal(loaded(torch.arange(9)), model(torch.arange(9)))


def test_inference_mode_and_autocast() -> None:
    layer = linear(compute="fp32")
    x = torch.randn(3, 96)
    with torch.inference_mode():
        assert torch.equal(layer(x), layer(x.clone()))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert layer(x).dtype is nn.functional.linear(x, layer.dequantize()).dtype is dtype
            y = layer(x.requires_grad_())
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.dtype is torch.float32


def test_checkpointed_and_vectorized_training_steps() -> None:
    from torch.utils.checkpoint import checkpoint

    layer = linear(compute="fp32")
    x = torch.randn(4, 96, requires_grad=True)
    (found,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), x)
    assert torch.equal(found, torch.autograd.grad(layer(x).sum(), x)[0])


# ---- threads -----------------------------------------------------------------------------------------


def test_threads_are_torchs(needs_c: None, run_python: Run) -> None:
    if not Path("/proc/self/task").is_dir():
        pytest.skip("counts threads in /proc")
    code = (
        "import os, torch, azquant as aq\n"
        "from azquant.torch import QuantLinear\n"
        "aq.set_num_threads(3)\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "torch.set_num_threads({n})\n"
        "with torch.inference_mode():\n"
        "    before = count()\n"
        "    QuantLinear(1024, 2048)(torch.randn(4, 1024))\n"
        "    assert count() - before == {n} - 1, (before, count())\n"
        "assert aq.num_threads() == 3"
    )
    for n in (1, 2):
        run_python(code.format(n=n), check=True)


def test_no_threads_beside_torchs(needs_c: None, run_python: Run) -> None:
    """OpenMP's do the work: two pools would take the processors from each other."""
    if not Path("/proc/self/task").is_dir() or not torch.backends.openmp.is_available():
        pytest.skip("counts threads in /proc, of a PyTorch with OpenMP")
    if not hasattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel"):
        pytest.skip("PyTorch has an OpenMP that cannot be shared")
    run_python(
        "import os, torch\n"
        "from azquant.torch import QuantLinear\n"
        "torch.set_num_threads(2)\n"
        "layer, x = QuantLinear(1024, 2048), torch.randn(256, 1024)\n"
        "with torch.inference_mode():\n"
        "    torch.nn.functional.gelu(torch.randn(1 << 20))\n"
        "    before = os.listdir('/proc/self/task')\n"
        "    layer(x)\n"
        "    assert os.listdir('/proc/self/task') == before, (before, os.listdir('/proc/self/task'))",
        check=True,
    )


FORKED = """
import os, signal, torch
from azquant.torch import QuantLinear
torch.set_num_threads(2)
torch.manual_seed(0)
layer = QuantLinear.from_linear(torch.nn.Linear(512, 512))
x = torch.randn(8, 512)
with torch.inference_mode():
    expected = layer(x)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # the threads of the parent are not there to be waited for
        os._exit(0 if torch.equal(layer(x), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(layer(x), expected)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes(run_python: Run) -> None:
    run_python(FORKED, check=True)


def test_several_threads_call_at_once() -> None:
    layer = QuantLinear.from_linear(nn.Linear(256, 512))
    inputs = [torch.randn(m, 256) for m in (1, 3, 40, 70)]
    with torch.no_grad():
        expected = [layer(x) for x in inputs]

    def work(i: int) -> bool:
        with torch.inference_mode():
            return torch.equal(layer(inputs[i % 4]), expected[i % 4])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(80)))


# ---- refusals ----------------------------------------------------------------------------------------


def test_refusals() -> None:
    layer = linear()
    with pytest.raises(ShapeError, match=r"\(2, 95\).*\(\.\.\., 96\)"):
        layer(torch.zeros(2, 95))
    with pytest.raises(DTypeError, match=r"not torch\.int64"):
        layer(torch.zeros(2, 96, dtype=torch.int64))
    with pytest.raises(DTypeError, match=r"not torch\.float64"):
        layer(torch.zeros(2, 96, dtype=torch.float64))
    with pytest.raises(ShapeError, match="whole number of q4_0 blocks"):
        QuantLinear(95, 8)
    with pytest.raises(UnsupportedTypeError):
        QuantLinear(256, 8, type="i8")
    with pytest.raises(ArgumentError, match="compute='int4'"):
        QuantLinear(64, 8, compute="int4")
    with pytest.raises(ShapeError, match="the bias has shape"):
        QuantLinear.from_qtensor(aq.quantize(np.ones((4, 32), np.float32)), torch.zeros(5))
    with pytest.raises(ShapeError, match="cannot share"):
        layer.tie(linear(8, 96))
    with pytest.raises(ShapeError, match="packed weights of 64 bytes"):
        torch.ops.azquant.linear(torch.zeros(2, 96), torch.zeros(64, dtype=torch.uint8), None, 2, 40, "auto")


def test_indices_out_of_range_are_refused() -> None:
    table = QuantEmbedding(10, 32)
    for index in (-1, 10):
        with pytest.raises(ShapeError, match="the table has 10 rows"):
            table(torch.tensor([0, index]))
    with pytest.raises(DTypeError, match="int32 or int64"):
        table(torch.tensor([0.0]))


def test_other_devices_are_refused_and_nothing_moves() -> None:
    layer = linear()
    for device in ("meta", "cuda"):
        with pytest.raises((ArgumentError, AssertionError, RuntimeError)) as caught:
            layer.to(device)
        if device == "meta":
            assert "cannot be moved to meta" in str(caught.value)
    assert layer.packed.device.type == layer.bias.device.type == "cpu"
    with pytest.raises(ArgumentError, match="the input is on meta: it holds no values"):
        layer(torch.zeros(2, 96, device="meta"))
    with pytest.raises(ArgumentError, match="the indices are on meta"):
        QuantEmbedding(10, 32)(torch.zeros(2, dtype=torch.int64, device="meta"))
    with pytest.raises(ArgumentError, match=r"cannot become torch\.float16"):
        layer.type(torch.float16)
    with pytest.raises(ArgumentError, match="meta device: load its values"):
        QuantLinear.from_linear(nn.Linear(32, 4, device="meta"))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # a CUDA tensor where there is no CUDA
        cuda = torch.empty(2, 96, device="cuda")
    with pytest.raises(ArgumentError, match=r"the input is on cuda.*\.cpu\(\)"):
        layer(cuda)


def test_without_torch_the_package_says_how_to_install_it(run_python: Run) -> None:
    done = run_python(
        "import sys; sys.modules['torch'] = None\n"
        "import azquant\n"
        "try:\n"
        "    import azquant.torch\n"
        "except azquant.errors.MissingDependencyError as error:\n"
        "    print(isinstance(error, ImportError), error)"
    )
    assert "True azquant.torch needs PyTorch" in done.stdout
    assert "pip install 'azquant[torch]'" in done.stdout
