"""What the quantizer is compared on with llama-quantize, and the hashes of what that program made of it.

The models are made of integer arithmetic alone, so they are the same everywhere. To make the hashes again,
with a llama.cpp built for x86-64 without -march flags in ggml-base (as its CMake files do):

    python tests/quantize_cases.py /path/to/llama-quantize
"""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

GOLDEN = Path(__file__).parent / "golden" / "llama_quantize.json"
TARGETS = [
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q8_0",
    "q2_k",
    "q3_k_s",
    "q3_k_m",
    "q3_k_l",
    "q4_k_s",
    "q4_k_m",
    "q5_k_s",
    "q5_k_m",
    "q6_k",
    "iq4_nl",
    "iq4_xs",
    "tq1_0",
    "tq2_0",
    "f16",
    "bf16",
]

GPT2 = {"arch": "gpt2", "width": 256, "ffn": 512, "layers": 8, "heads": 4, "kv_heads": 4, "vocab": 48}
LLAMA = {"arch": "llama", "width": 256, "ffn": 684, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 48}
CASES: dict[str, dict[str, Any]] = {
    "gpt2-256-tied": GPT2,
    "gpt2-256-imatrix": {**GPT2, "imatrix": "gguf"},
    "gpt2-512-untied": {**GPT2, "width": 512, "layers": 1, "head": True},
    "gpt2-768-tied": {**GPT2, "width": 768, "ffn": 768, "layers": 1},
    "llama-256-ffn-684": {**LLAMA, "head": True},
    "llama-256-imatrix": {**LLAMA, "ffn": 512, "layers": 8, "imatrix": "dat"},
    "llama-896-grouped": {**LLAMA, "width": 896, "ffn": 512, "layers": 1, "heads": 14, "kv_heads": 2},
    "llama-256-f16": {**LLAMA, "ffn": 256, "source": np.float16, "head": True},
    "llama-256-mixture": {**LLAMA, "ffn": 256, "layers": 3, "head": True, "experts": 8},
    "qwen3moe-256-mixture": {
        **LLAMA,
        "arch": "qwen3moe",
        "ffn": 256,
        "layers": 8,
        "heads": 8,
        "experts": 3,
        "imatrix": "gguf",
    },
    "gpt2-256-pure": {**GPT2, "layers": 2, "options": {"pure": True}},
    "llama-256-types": {
        **LLAMA,
        "ffn": 512,
        "head": True,
        "options": {
            "output_type": "q8_0",
            "token_embedding_type": "q5_1",
            "tensor_types": [("ffn_(up|gate)", "q6_k"), ("blk\\.1\\..*_q", "q5_0")],
        },
    },
}


def numbers(seed: str, count: int, scale: float) -> NDArray[np.float32]:
    """About normal, some zero, a few outliers: float32, the same on every machine."""
    state = np.arange(count, dtype=np.uint64) + np.uint64(zlib.crc32(seed.encode()) << 20)
    with np.errstate(over="ignore"):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64's finalizer
            state = (state ^ state >> np.uint64(shift)) * np.uint64(factor)
    state ^= state >> np.uint64(31)
    quarters = state.view(np.uint16).reshape(-1, 4).astype(np.int64) - 32768
    values = quarters.sum(axis=1).astype(np.float32) * np.float32(scale / 37837)
    kind = (state >> np.uint64(7)) % np.uint64(211)
    values[kind == 0] *= 12
    values[kind == 1] = 0
    values[kind == 2] = np.float32(-0.0)
    return values


def tensors(case: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a case's tensors."""
    width, ffn, vocab = case["width"], case["ffn"], case["vocab"]
    gpt2 = case["arch"] == "gpt2"
    kv = width // case["heads"] * case["kv_heads"]
    yield "token_embd.weight", (vocab, width)
    if gpt2:
        yield "position_embd.weight", (16, width)
    yield "output_norm.weight", (width,)
    if gpt2:
        yield "output_norm.bias", (width,)
    if case.get("head"):
        yield "output.weight", (vocab, width)
    linear = {"attn_output": (width, width), "ffn_up": (ffn, width), "ffn_down": (width, ffn)}
    if gpt2:
        linear = {"attn_qkv": (3 * width, width), **linear}
    else:
        linear |= {
            "attn_q": (width, width),
            "attn_k": (kv, width),
            "attn_v": (kv, width),
            "ffn_gate": (ffn, width),
        }
    if count := case.get("experts"):
        linear = {name: shape for name, shape in linear.items() if not name.startswith("ffn")} | {
            "ffn_gate_inp": (count, width),
            "ffn_gate_exps": (count, ffn, width),
            "ffn_up_exps": (count, ffn, width),
            "ffn_down_exps": (count, width, ffn),
        }
    for layer in range(case["layers"]):
        for norm in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{norm}.weight", (width,)
            if gpt2:
                yield f"blk.{layer}.{norm}.bias", (width,)
        for name, shape in linear.items():
            yield f"blk.{layer}.{name}.weight", shape
            if gpt2:
                yield f"blk.{layer}.{name}.bias", shape[:1]


def write_source(case: dict[str, Any], path: Path) -> None:
    """The case's model, by the gguf package."""
    writer = gguf.GGUFWriter(path, case["arch"])
    writer.add_context_length(16)
    writer.add_embedding_length(case["width"])
    writer.add_block_count(case["layers"])
    writer.add_feed_forward_length(case["ffn"])
    writer.add_head_count(case["heads"])
    writer.add_head_count_kv(case["kv_heads"])
    if "experts" in case:
        writer.add_expert_count(case["experts"])
        writer.add_expert_used_count(2)
    writer.add_layer_norm_eps(1e-5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(case["vocab"])
    writer.add_tokenizer_model("no_vocab")
    for name, shape in tensors(case):
        values = numbers(name, int(np.prod(shape)), 1 / 16).reshape(shape)
        writer.add_tensor(name, values.astype(case.get("source", np.float32)) if len(shape) > 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_imatrix(case: dict[str, Any], path: Path) -> None:
    """An importance matrix for every linear tensor, in the case's format."""
    rows = [
        (name, np.abs(numbers(name + ".imatrix", int(np.prod(shape) // shape[-2]), 3.0)) * np.float32(5))
        for name, shape in tensors(case)
        if len(shape) > 1 and name.startswith("blk")
    ]
    if case["imatrix"] == "dat":
        with path.open("wb") as file:
            file.write(struct.pack("<i", len(rows)))
            for name, values in rows:
                file.write(struct.pack("<i", len(name)) + name.encode())
                file.write(struct.pack("<ii", 7, len(values)) + values.astype("<f4").tobytes())
            file.write(struct.pack("<ii", 7, 4) + b"text")
        return
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in rows:
        experts = case["experts"] if "_exps" in name else 1
        writer.add_tensor(f"{name}.in_sum2", values.reshape(experts, -1) if experts > 1 else values)
        writer.add_tensor(f"{name}.counts", np.full((experts, 1), 7.0, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def digest(path: Path) -> dict[str, Any]:
    """How many tensors a file has of each type, and a hash of all names, types and bytes."""
    hashed = hashlib.sha256()
    counts: dict[str, int] = {}
    for tensor in sorted(gguf.GGUFReader(path).tensors, key=lambda tensor: str(tensor.name)):
        type_ = tensor.tensor_type.name.lower()
        counts[type_] = counts.get(type_, 0) + 1
        hashed.update(f"{tensor.name} {type_} ".encode() + tensor.data.tobytes())
    return {"types": dict(sorted(counts.items())), "sha256": hashed.hexdigest()}


def _flags(options: dict[str, Any]) -> list[str]:
    flags = ["--pure"] if options.get("pure") else []
    if "output_type" in options:
        flags += ["--output-tensor-type", options["output_type"]]
    if "token_embedding_type" in options:
        flags += ["--token-embedding-type", options["token_embedding_type"]]
    for pattern, type_ in options.get("tensor_types", ()):
        flags += ["--tensor-type", f"{pattern}={type_}"]
    return flags


def main(llama_quantize: str) -> None:
    """Writes GOLDEN from what ``llama_quantize`` makes."""
    golden: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source, made, matrix = (Path(folder) / name for name in ("source.gguf", "made.gguf", "matrix"))
        for name, case in CASES.items():
            write_source(case, source)
            flags = _flags(case.get("options", {}))
            if "imatrix" in case:
                write_imatrix(case, matrix)
                flags += ["--imatrix", str(matrix)]
            golden[name] = {}
            for target in TARGETS:
                command = [llama_quantize, *flags, str(source), str(made), target, "2"]
                subprocess.run(command, check=True, capture_output=True)
                golden[name][target] = digest(made)
            print(name)
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
