"""Converting a Hugging Face GPT-2 to Q4_0, against llama.cpp's converter followed by its llama-quantize.

    AZQUANT_LLAMA_CPP=<a checkout of llama.cpp, built> python -m pytest benchmarks/bench_convert.py

Rows of one group are ratios of one run. Each row is what a user waits for: a process of its own, from the
folder in safetensors to the file on the disk. ``library`` is the call alone, in a process that has imported
azquant. llama.cpp's rows are left out where AZQUANT_LLAMA_CPP does not say where it is; its converter needs
torch. It gets two helps without which it refuses such a model: the key ``n_ctx``, and a name for the
pre-tokenizer, whose hash it does not know. Files are in the page cache for all, and every program's modules
are compiled, as pip leaves them (a warm-up round does it, whatever PYTHONDONTWRITEBYTECODE says).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import azquant

SIZES = {"110M": (768, 12, 12), "335M": (1024, 24, 16)}
VOCABULARY = 32_000
CONTEXT = 1024

UPSTREAM = """
import runpy, sys
root, folder, out = sys.argv[1:]
sys.path[:0] = [root, root + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = ["convert_hf_to_gguf.py", folder, "--outtype", "f16", "--outfile", out]
runpy.run_path(root + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def write_gpt2(folder: Path, width: int, layers: int, heads: int) -> Path:
    """Random weights as GPT2LMHeadModel saves them, tied, with a byte-level tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    folder.mkdir()
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (VOCABULARY, width), "wpe.weight": (CONTEXT, width)}
    for name, shape in (
        *((f"h.{i}.{part}", shape) for i in range(layers) for part, shape in _block(width)),
        ("ln_f", (width,)),
    ):
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[-1:]}
    tensors = {
        f"transformer.{name}": random.standard_normal(shape, dtype=np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": VOCABULARY,
        "n_ctx": CONTEXT,
        "n_positions": CONTEXT, "n_embd": width, "n_layer": layers, "n_head": heads, "eos_token_id": 256,
        "bos_token_id": 256, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    details = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(details), encoding="utf-8")
    return folder


def _block(width: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return (
        ("ln_1", (width,)),
        ("attn.c_attn", (width, 3 * width)),
        ("attn.c_proj", (width, width)),
        ("ln_2", (width,)),
        ("mlp.c_fc", (width, 4 * width)),
        ("mlp.c_proj", (4 * width, width)),
    )


@pytest.fixture(scope="module", params=SIZES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, named by its size."""
    return write_gpt2(tmp_path_factory.mktemp("gpt2") / request.param, *SIZES[request.param])


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Programs keep the bytecode that they make."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        patch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.mktemp("bytecode")))
        yield


def _run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


def bench_azquant(benchmark: Any, folder: Path, tmp_path: Path) -> None:
    benchmark.group = f"GPT-2 {folder.name} to Q4_0"
    out = tmp_path / "out.gguf"
    command = (sys.executable, "-m", "azquant", "convert", folder, out, "--quiet")
    benchmark.pedantic(_run, command, setup=lambda: out.unlink(missing_ok=True), rounds=7, warmup_rounds=1)


def bench_library(benchmark: Any, folder: Path, tmp_path: Path) -> None:
    benchmark.group = f"GPT-2 {folder.name} to Q4_0"
    out = tmp_path / "out.gguf"
    benchmark.pedantic(azquant.convert, (folder, out), {"overwrite": True}, rounds=3, warmup_rounds=1)


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32_000, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip

MEASURE = """
import pathlib, resource, sys, warnings
warnings.simplefilter("ignore")
from azquant.conversion import convert
limit = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
convert(sys.argv[1], sys.argv[2], overwrite=True)
print(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def bench_memory(benchmark: Any, tmp_path: Path) -> None:
    """A sparse checkpoint of 4.5 GB, with 1.5 GB of address space: the peak is in the row's extra info.

    The bound is the largest source tensor in F32 (525 MB here) and 200 MB.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to see the peak memory")
    width, inner, vocabulary = 4096, 14336, 32_000
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "lm_head.weight": (vocabulary, width)}
    for i in range(4):
        for name, rows, columns in (
            ("self_attn.q_proj", width, width),
            ("self_attn.k_proj", width // 4, width),
            ("self_attn.v_proj", width // 4, width),
            ("self_attn.o_proj", width, width),
            ("mlp.gate_proj", inner, width),
            ("mlp.up_proj", inner, width),
            ("mlp.down_proj", width, inner),
        ):
            shapes[f"model.layers.{i}.{name}.weight"] = (rows, columns)
    header: dict[str, Any] = {}
    offset = 0
    norms = [f"model.layers.{i}.{n}_layernorm.weight" for i in range(4) for n in ("input", "post_attention")]
    for name, shape in {**shapes, **dict.fromkeys([*norms, "model.norm.weight"], (width,))}.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.seek(8 + len(head))
        file.write(np.ones(1, np.float32).tobytes())  # so that the embedding is not the head
        file.truncate(8 + len(head) + offset)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(tmp_path / "out.gguf"), str(1500 << 20)]
    benchmark.group = f"Llama of {offset / 1e9:.1f} GB to Q4_0"

    def run() -> None:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        benchmark.extra_info["peak_rss_mb"] = int(done.stdout) // 1024

    benchmark.pedantic(run, rounds=1)
    print(f"peak RSS {benchmark.extra_info['peak_rss_mb']} MB")


def bench_llama_cpp(benchmark: Any, folder: Path, tmp_path: Path) -> None:
    root = os.environ.get("AZQUANT_LLAMA_CPP")
    quantize = Path(root or "", "build", "bin", "llama-quantize")
    if not root or not quantize.is_file():
        pytest.skip("AZQUANT_LLAMA_CPP names no built llama.cpp")
    pytest.importorskip("torch")
    benchmark.group = f"GPT-2 {folder.name} to Q4_0"
    half, out = tmp_path / "f16.gguf", tmp_path / "q4_0.gguf"

    def both() -> None:
        _run(sys.executable, "-c", UPSTREAM, root, folder, half)
        _run(quantize, half, out, "Q4_0")

    def without_files() -> None:
        for file in (half, out):
            file.unlink(missing_ok=True)

    benchmark.pedantic(both, setup=without_files, rounds=3, warmup_rounds=1)
