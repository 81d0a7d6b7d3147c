"""Other people's 4-bit matmuls, each as a function of x, for side-by-side timing. Absent ones are left out.

Every peer multiplies the same weights (N, K), quantized its own way to 4 bits in groups of 32, or dense bf16
where its name says so.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

import azquant

Floats = npt.NDArray[np.float32]
Multiply = Callable[[Floats], object]

GGML_TYPE_F32, GGML_TYPE_Q4_0 = 0, 2


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def ggml_folder(build: str = "build") -> Path | None:
    """Where build_peers.sh put ggml's libraries: AZQUANT_PEERS/llama.cpp/build/bin, or build-avx2/bin."""
    root = os.environ.get("AZQUANT_PEERS")
    folder = Path(root) / "llama.cpp" / build / "bin" if root else None
    return folder if folder and (folder / "libggml-cpu.so").exists() else None


class Ggml:
    """ggml's CPU backend through ctypes, weights in the buffer type that its own loader prefers."""

    def __init__(self, folder: Path) -> None:
        # Symbols stay local, so that two builds of libggml-cpu live side by side. They share the libggml-base
        # that was loaded first, the same code.
        self.base = ctypes.CDLL(str(folder / "libggml-base.so"))
        self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        b = self.base
        for name, result, arguments in (
            ("ggml_init", pointer, [_InitParams]),
            ("ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]),
            ("ggml_mul_mat", pointer, [pointer, pointer, pointer]),
            ("ggml_new_graph", pointer, [pointer]),
            ("ggml_build_forward_expand", None, [pointer, pointer]),
            ("ggml_backend_alloc_ctx_tensors_from_buft", pointer, [pointer, pointer]),
            ("ggml_backend_tensor_set", None, [pointer, pointer, size, size]),
            ("ggml_backend_tensor_get", None, [pointer, pointer, size, size]),
            ("ggml_backend_graph_compute", ctypes.c_int, [pointer, pointer]),
            ("ggml_backend_reg_get_proc_address", pointer, [pointer, ctypes.c_char_p]),
            ("ggml_backend_reg_dev_get", pointer, [pointer, size]),
            ("ggml_backend_dev_supports_op", ctypes.c_bool, [pointer, pointer]),
            ("ggml_backend_cpu_buffer_type", pointer, []),
            ("ggml_backend_buffer_free", None, [pointer]),
            ("ggml_backend_buft_name", ctypes.c_char_p, [pointer]),
            ("quantize_row_q4_0_ref", None, [pointer, pointer, ctypes.c_int64]),
            ("dequantize_row_q4_0", None, [pointer, pointer, ctypes.c_int64]),
        ):
            function = getattr(b, name)
            function.restype, function.argtypes = result, arguments
        self.cpu.ggml_backend_cpu_init.restype = pointer
        self.cpu.ggml_backend_cpu_reg.restype = pointer
        self.cpu.ggml_backend_cpu_set_n_threads.argtypes = [pointer, ctypes.c_int]
        self.backend = self.cpu.ggml_backend_cpu_init()
        self._buffers: list[int] = []

    def _context(self) -> int:
        context: int = self.base.ggml_init(_InitParams(1 << 24, None, True))
        return context

    def buffer_types(self) -> list[int]:
        """The CPU's special buffer types (AMX, repacking), in the order in which ggml prefers them."""
        registry = self.cpu.ggml_backend_cpu_reg()
        found = self.base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not found:
            return []
        device = self.base.ggml_backend_reg_dev_get(registry, 0)
        get = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(found)
        types = []
        for item in get(device):
            if not item:
                break
            types.append(item)
        return types

    def preferred(self, type_id: int, n: int, k: int, m: int) -> int:
        """The first buffer type in which ggml multiplies such weights, asked as its loader asks."""
        b = self.base
        device = b.ggml_backend_reg_dev_get(self.cpu.ggml_backend_cpu_reg(), 0)
        for buffer_type in self.buffer_types():
            context = self._context()
            w = b.ggml_new_tensor_2d(context, type_id, k, n)
            buffer = b.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
            work = self._context()
            product = b.ggml_mul_mat(work, w, b.ggml_new_tensor_2d(work, GGML_TYPE_F32, k, m))
            taken = bool(buffer) and b.ggml_backend_dev_supports_op(device, product)
            if buffer:
                b.ggml_backend_buffer_free(buffer)
            if taken:
                return buffer_type
        plain: int = b.ggml_backend_cpu_buffer_type()
        return plain

    def matmul(
        self,
        weights: npt.NDArray[np.uint8],
        n: int,
        k: int,
        m: int,
        threads: int,
        type_id: int = GGML_TYPE_Q4_0,
    ) -> tuple[str, Multiply]:
        """(name of the weights' buffer type, multiply) for x of m rows."""
        b = self.base
        context = self._context()
        w = b.ggml_new_tensor_2d(context, type_id, k, n)
        buffer_type = self.preferred(type_id, n, k, m)
        self._buffers.append(b.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type))
        if not self._buffers[-1]:
            raise MemoryError("ggml could not allocate the weights")
        b.ggml_backend_tensor_set(w, weights.ctypes.data, 0, weights.nbytes)
        work = self._context()
        x = b.ggml_new_tensor_2d(work, GGML_TYPE_F32, k, m)
        y = b.ggml_mul_mat(work, w, x)
        graph = b.ggml_new_graph(work)
        b.ggml_build_forward_expand(graph, y)
        self._buffers.append(
            b.ggml_backend_alloc_ctx_tensors_from_buft(work, b.ggml_backend_cpu_buffer_type())
        )
        out = np.empty((m, n), np.float32)

        def multiply(values: Floats) -> Floats:
            self.cpu.ggml_backend_cpu_set_n_threads(self.backend, threads)
            b.ggml_backend_tensor_set(x, values.ctypes.data, 0, values.nbytes)
            if b.ggml_backend_graph_compute(self.backend, graph) != 0:
                raise RuntimeError("ggml could not compute")
            b.ggml_backend_tensor_get(y, out.ctypes.data, 0, out.nbytes)
            return out

        return b.ggml_backend_buft_name(buffer_type).decode(), multiply

    def release(self) -> None:
        """Frees the weights and results of every matmul so far, which must not be called any more."""
        for buffer in self._buffers:
            self.base.ggml_backend_buffer_free(buffer)
        self._buffers.clear()


def torch_bf16(weights: Floats, threads: int) -> Multiply | None:
    """PyTorch, dense bf16 weights and activations."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads)
    w = torch.from_numpy(weights).bfloat16()

    def multiply(x: Floats) -> object:
        with torch.inference_mode():
            return torch.nn.functional.linear(torch.from_numpy(x).bfloat16(), w)

    return multiply


def torch_int4(weights: Floats, threads: int) -> Multiply | None:
    """PyTorch's own 4-bit CPU weights (_weight_int4pack_mm_for_cpu), groups of 32."""
    try:
        import torch

        pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        mm = torch.ops.aten._weight_int4pack_mm_for_cpu
    except (ImportError, AttributeError):
        return None
    torch.set_num_threads(threads)
    n, k = weights.shape
    packed = pack(torch.randint(0, 16, (n, k), dtype=torch.int32), 1)
    scales = torch.rand((k // 32, n, 2)).bfloat16()

    def multiply(x: Floats) -> object:
        with torch.inference_mode():
            return mm(torch.from_numpy(x).bfloat16(), packed, 32, scales)

    return multiply


def onnxruntime_nbits(weights: Floats, threads: int) -> Multiply | None:
    """onnxruntime's MatMulNBits, 4 bits in blocks of 32, int8 activations (accuracy level 4)."""
    try:
        import onnx
        import onnxruntime
    except ImportError:
        return None
    n, k = weights.shape
    rng = np.random.default_rng(0)
    blocks = onnx.numpy_helper.from_array(rng.integers(0, 256, (n, k // 32, 16), dtype=np.uint8), "b")
    scales = onnx.numpy_helper.from_array(rng.random((n, k // 32), dtype=np.float32), "s")
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", "b", "s"],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=4,
        block_size=32,
        accuracy_level=4,
    )
    f32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", f32, ["m", k])],
        [onnx.helper.make_tensor_value_info("y", f32, ["m", n])],
        [blocks, scales],
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(None, {"x": x})[0]


def openvino_int4(weights: Floats, threads: int) -> Multiply | None:
    """OpenVINO's CPU plugin, weights of 4 signed bits with a scale per 32, activations to int8 per 32."""
    try:
        import openvino
        from openvino import opset13 as ops
    except ImportError:
        return None
    n, k = weights.shape
    blocks = weights.reshape(n, k // 32, 32)
    scales = np.abs(blocks).max(axis=2, keepdims=True) / 7
    q = np.rint(blocks / scales).astype(np.int8).view(np.uint8).reshape(-1, 2) & 15
    packed = q[:, 0] | q[:, 1] << 4
    nibbles = openvino.Tensor(packed, openvino.Shape([n, k // 32, 32]), openvino.Type.i4)
    dense = ops.multiply(
        ops.convert(ops.constant(nibbles), np.float16), ops.constant(scales.astype(np.float16))
    )
    rows = ops.convert(ops.reshape(dense, ops.constant(np.array([n, k])), False), np.float32)
    x = ops.parameter([-1, k], np.float32)
    model = openvino.Model([ops.matmul(x, rows, False, True)], [x])
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32,
    }
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()

    def multiply(values: Floats, keep: object = (packed, nibbles)) -> object:  # the model views their memory
        return request.infer([values])[0]

    return multiply


def numpy_fallback(weights: azquant.QTensor) -> Multiply:
    """azquant's own NumPy backend: dequantize, then BLAS (which keeps its own threads)."""
    from azquant import _fallback

    matrix = _fallback.Matrix(weights.type.id, weights.data, *weights.shape)
    return lambda x: matrix.matmul(x, "fp32")
