"""Wrong arguments and damaged models: one of our errors, at once, and the model goes on working."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_support import tiny_model

import azquant
from azquant import _backend
from azquant.engine import Model
from azquant.errors import (
    ArgumentError,
    AzquantError,
    ContextLengthError,
    ModelError,
    OutOfMemoryError,
    TokenizerError,
)
from azquant.gguf import MetadataValue, TensorSpec, keys, open_gguf, write_gguf


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("m"), "llama", "q8_0")


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    return azquant.load(path)


# ---- prompts

BAD_PROMPTS: list[tuple[Any, type[AzquantError]]] = [
    ("\ud800", TokenizerError),
    ("a\udfff", TokenizerError),
    (["a", "\ud800"], TokenizerError),
    ("x" * 500, ContextLengthError),
    ("x" * (1 << 26), ContextLengthError),
    ([1] * 33, ContextLengthError),
    (["a", "b" * 60], ContextLengthError),
    ([], ArgumentError),
    ([[1], []], ArgumentError),
    ([[]], ArgumentError),
    ([257], ArgumentError),
    ([-1], ArgumentError),
    ([1 << 40], ArgumentError),
    ([1 << 70], ArgumentError),
    ([1.5], ArgumentError),
    ([1, "a"], ArgumentError),
    ([1, None], ArgumentError),
    ([True, False], ArgumentError),
    ([[1, [2]]], ArgumentError),
    ([[[1]]], ArgumentError),
    (None, ArgumentError),
    (5, ArgumentError),
    (b"bytes", ArgumentError),
    ([b"bytes"], ArgumentError),
    ({}, ArgumentError),
    ({1, 2}, ArgumentError),
    ((c for c in "ab"), ArgumentError),
    (np.zeros((2, 0), dtype=int), ArgumentError),
    (np.array([1.0]), ArgumentError),
]


@pytest.mark.parametrize(("prompt", "error"), BAD_PROMPTS, ids=lambda value: f"{value!r:.30}")
def test_bad_prompts(model: Model, prompt: Any, error: type[AzquantError]) -> None:
    begin = time.perf_counter()
    with pytest.raises(error):
        model.generate(prompt)
    if not isinstance(prompt, list):
        with pytest.raises(error):
            next(model.stream(prompt))
        with pytest.raises(error):
            model.submit(prompt)
    assert time.perf_counter() - begin < 2
    assert model.generate("a", max_tokens=1) is not None


def test_good_prompts_that_look_odd(model: Model) -> None:
    assert isinstance(model.generate("a\0b", max_tokens=2), str)
    assert len(model.generate(np.array([1, 2], dtype=np.uint8), max_tokens=2)) <= 2
    assert len(model.generate(np.array([[1, 2], [3, 4]]), max_tokens=2)) == 2
    assert len(model.generate(("a", "b"), max_tokens=2)) == 2
    assert isinstance(model.generate("", max_tokens=2), str)  # begins with BOS
    mixed: Any = model.generate(["a", [1, 2]], max_tokens=2)
    assert [type(answer) for answer in mixed] == [str, list]
    assert isinstance(model.generate("a", max_tokens=1 << 70), str)


def test_options_outside_the_vocabulary(model: Model) -> None:
    for options in ({"stop_tokens": [257]}, {"logit_bias": {257: 1.0}}, {"logit_bias": {1 << 70: 1.0}}):
        with pytest.raises(ArgumentError, match="ids end at 256"):
            model.generate("a", **options)
    with pytest.raises(ArgumentError):
        model.generate("a", temperature=math.nan)
    with pytest.raises(TypeError, match="temprature"):
        model.generate("a", temprature=1)


def test_no_bos_and_no_prompt(tmp_path: Path) -> None:
    without = altered(tiny_model(tmp_path, "gpt2"), tmp_path / "x.gguf", drop=[keys.BOS_TOKEN_ID])
    with pytest.raises(ArgumentError, match="no tokens to start from"):
        azquant.load(without).generate("")


@pytest.mark.parametrize(
    "options",
    [
        {"n_ctx": 0},
        {"n_ctx": -5},
        {"n_ctx": 1.5},
        {"n_ctx": True},
        {"n_seq": 0},
        {"n_seq": 1 << 40},
        {"compute": "fp8"},
        {"kv_type": "q4"},
    ],
    ids=str,
)
def test_wrong_load_options(path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        azquant.load(path, **options)


def test_no_memory_for_the_cache(model: Model, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = azquant.load(path, n_seq=3)

    def fail(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(_backend.kernels(), "KVCache", fail)
        with pytest.raises(OutOfMemoryError, match=r"KV cache of 3 sequences of 32 positions takes .* n_ctx"):
            fresh.generate("a")
    assert fresh.generate("a", max_tokens=2) == model.generate("a", max_tokens=2)


def test_slots_follow_the_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from azquant.engine import model as module

    slot = 2 * 2 * 32 * 2 * 32 * 2  # keys and values, layers, positions, heads, values of a head, bytes
    for limit, expected in ((1 << 40, 16), (2 * slot * 5, 5), (10, 1)):
        monkeypatch.setattr(module, "memory_limit", lambda limit=limit: limit)
        assert azquant.load(path)._new_cache().n_seq == expected


def test_memory_limit_of_control_groups(tmp_path: Path) -> None:
    from azquant.engine._memory import memory_limit

    whole = memory_limit(tmp_path)
    assert whole > 1 << 20
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_limit(tmp_path) == whole
    (tmp_path / "memory.max").write_text("1048576\n")
    assert memory_limit(tmp_path) == 1048576


def test_what_control_groups_leave(tmp_path: Path) -> None:
    """Version 1 and 2, the process's own group and those above it; the tightest counts."""
    from azquant.engine._memory import available_memory

    def group(folder: Path, limit: str, used: int, droppable: int, version: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        one = version == 1
        (folder / ("memory.limit_in_bytes" if one else "memory.max")).write_text(f"{limit}\n")
        (folder / ("memory.usage_in_bytes" if one else "memory.current")).write_text(f"{used}\n")
        name = "total_inactive_file" if one else "inactive_file"
        (folder / "memory.stat").write_text(f"anon 5\n{name} {droppable}\n")

    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  900000 kB\nSwapFree: 100000 kB\n")
    assert available_memory(root, proc) == 1000000 * 1024
    (proc / "self" / "cgroup").write_text("0::/job/step\n")
    group(root / "job" / "step", "max", 5, 0, 2)
    assert available_memory(root, proc) == 1000000 * 1024
    group(root / "job", "500000000", 100000000, 20000000, 2)
    assert available_memory(root, proc) == 420000000
    group(root / "job" / "step", "400000000", 100000000, 0, 2)
    assert available_memory(root, proc) == 300000000
    (proc / "self" / "cgroup").write_text("7:cpu,memory:/job\n0::/\n")
    group(root / "memory" / "job", "200000000", 300000000, 0, 1)
    assert available_memory(root, proc) == 0
    assert available_memory(root, tmp_path / "none") == azquant.engine._memory.memory_limit(root)


def test_too_little_memory_is_refused_before_anything_is_packed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from azquant.engine import model as module

    needs = azquant.load(path, n_ctx=32, n_seq=3).memory
    assert needs.total == needs.weights + 3 * needs.cache_per_sequence + needs.work
    monkeypatch.setattr(module.FileWeights, "pack", lambda *_: pytest.fail("packed"))
    monkeypatch.setattr(module, "available_memory", lambda: needs.total - 1)
    with pytest.raises(OutOfMemoryError, match=r"(?s)takes .* available.*Weights .*KV cache .*3 seq.*n_ctx"):
        azquant.load(path, n_ctx=32, n_seq=3)
    monkeypatch.setattr(module, "available_memory", lambda: needs.weights)
    with pytest.raises(MemoryError, match="smaller type of weights"):
        azquant.load(path)


def test_a_cache_that_nobody_asked_for_is_no_reason_to_refuse(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from azquant.engine import model as module

    needs = azquant.load(path).memory
    monkeypatch.setattr(module, "available_memory", lambda: needs.weights + needs.work)
    assert azquant.load(path).generate("a", max_tokens=1) is not None


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
def test_the_memory_stated_is_the_memory_taken(path: Path, kv_type: str) -> None:
    model = azquant.load(path, kv_type=kv_type, n_ctx=20, n_seq=3)
    assert model._new_cache().nbytes == model.memory.cache
    kept = sum(t.packed_nbytes or t.nbytes for t in model._weights._all())
    assert model.memory.weights == kept


# ---- models (classes 31 to 38 of the catalogue of bad input)


def altered(
    source: Path,
    target: Path,
    changes: dict[str, MetadataValue] | None = None,
    drop: list[str] | None = None,
    without: str = "",
    damage: Callable[[str, Any], Any] = lambda _, data: data,
) -> Path:
    """A copy with other metadata, without some keys or a tensor, or with damaged data."""
    with open_gguf(source) as file:
        metadata = {}
        for key, value in file.metadata.items():
            if key not in (drop or ()):
                is_array = hasattr(value, "element_type")
                kind = file.metadata_types[key]
                metadata[key] = (
                    keys.array(value.element_type, value[:]) if is_array else MetadataValue(kind, value)
                )
        metadata.update(changes or {})
        tensors = {name: t for name, t in file.tensors.items() if name != without}
        write_gguf(
            target,
            metadata,
            [TensorSpec(name, tuple(t.shape), t.type) for name, t in tensors.items()],
            lambda spec: [damage(spec.name, tensors[spec.name].data)],
            overwrite=True,
        )
    return target


BAD_METADATA = {
    "block_count 0": {"llama.block_count": keys.u32(0)},
    "block_count 513": {"llama.block_count": keys.u32(513)},
    "block_count 2^32-1": {"llama.block_count": keys.u32(2**32 - 1)},
    "block_count of another type": {"llama.block_count": keys.string("2")},
    "one block too many": {"llama.block_count": keys.u32(3)},
    "one block too few": {"llama.block_count": keys.u32(1)},
    "head_count 0": {"llama.attention.head_count": keys.u32(0)},
    "head_count_kv 0": {"llama.attention.head_count_kv": keys.u32(0)},
    "head_count_kv 3 of 4": {"llama.attention.head_count_kv": keys.u32(3)},
    "embedding_length 0": {"llama.embedding_length": keys.u32(0)},
    "embedding_length 128": {"llama.embedding_length": keys.u32(128)},
    "feed_forward_length": {"llama.feed_forward_length": keys.u32(97)},
    "rope odd": {"llama.rope.dimension_count": keys.u32(31)},
    "rope beyond the head": {"llama.rope.dimension_count": keys.u32(34)},
    "context_length 2^32-1": {"llama.context_length": keys.u32(2**32 - 1)},
    "context_length 0": {"llama.context_length": keys.u32(0)},
    "epsilon NaN": {"llama.attention.layer_norm_rms_epsilon": keys.f32(math.nan)},
    "bos outside": {keys.BOS_TOKEN_ID: keys.u32(257)},
    "eos outside": {keys.EOS_TOKEN_ID: keys.u32(2**32 - 1)},
    "no such architecture": {keys.ARCHITECTURE: keys.string("lamma")},
    "architecture of another type": {keys.ARCHITECTURE: keys.u32(1)},
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_bad_metadata(path: Path, tmp_path: Path, case: str) -> None:
    begin = time.perf_counter()
    with pytest.raises(ModelError):
        azquant.load(altered(path, tmp_path / "bad.gguf", BAD_METADATA[case]))
    assert time.perf_counter() - begin < 2


def test_missing_tensors(path: Path, tmp_path: Path) -> None:
    with open_gguf(path) as file:
        names = set(file.tensors) - {"output.weight"}  # the embedding would take its place
    for name in names:
        with pytest.raises(ModelError, match=name):
            azquant.load(altered(path, tmp_path / "bad.gguf", without=name))


def test_a_huge_context_is_reserved_not_taken(path: Path, tmp_path: Path) -> None:
    big = altered(path, tmp_path / "big.gguf", {"llama.context_length": keys.u32(1 << 24)})
    model = azquant.load(big)
    try:
        assert model.generate("a", max_tokens=2) == azquant.load(path).generate("a", max_tokens=2)
    except OutOfMemoryError as error:  # where the system reserves nothing it does not have
        assert "n_ctx" in str(error)
    assert isinstance(azquant.load(big, n_ctx=64).generate("a", max_tokens=2), str)


def test_weights_that_give_nan(path: Path, tmp_path: Path) -> None:
    def damage(name: str, data: Any) -> Any:
        broken = np.array(data)
        if name == "output_norm.weight":
            broken[:4] = np.array([np.nan], dtype="<f4").view(np.uint8)
        return broken

    model = azquant.load(altered(path, tmp_path / "nan.gguf", damage=damage))
    for temperature in (0, 1):
        with pytest.raises(ModelError, match="not finite"):
            model.generate("a", temperature=temperature)


def test_a_model_without_a_tokenizer(path: Path, tmp_path: Path) -> None:
    with open_gguf(path) as file:
        drop = [key for key in file.metadata if key.startswith("tokenizer.")]
    sizes = {"llama.vocab_size": keys.u32(257)}
    model = azquant.load(altered(path, tmp_path / "no.gguf", sizes, drop=drop))
    assert len(model.generate([1, 2], max_tokens=3)) == 3
    for call in (
        lambda: model.generate("a"),
        lambda: model.generate([1], stop="x"),
        lambda: list(model.stream([1])),
    ):
        with pytest.raises(TokenizerError, match="no tokenizer"):
            call()


def test_the_files_of_the_catalogue(shared_data: Path) -> None:
    files = sorted((shared_data / "bad-gguf" / "model-level").glob("*.gguf"))
    assert len(files) > 20
    for file in files:
        begin = time.perf_counter()
        with pytest.raises(AzquantError):
            azquant.load(file)  # the one with the endless template is no whole model either
        assert time.perf_counter() - begin < 2


# ---- packing beside the tokenizer ----------------------------------------------------------------------


def test_a_large_model_builds_its_tokenizer_while_it_packs(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from azquant.engine import model as module

    assert not azquant.load(path).tokenizer._backends  # a small one when the first text comes
    monkeypatch.setattr(module, "_WORTH_A_THREAD", 0)
    model = azquant.load(path)
    assert model.tokenizer._backends
    assert all(tensor.packed_nbytes for tensor in model._weights._all() if tensor.type.name == "q4_0")
    assert model.generate("a", max_tokens=4) == azquant.load(path).generate("a", max_tokens=4)


def test_what_goes_wrong_while_packing_is_raised(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from azquant.engine import model as module
    from azquant.engine import weights

    def fail(_: list[Any]) -> None:
        raise OutOfMemoryError("pack")

    monkeypatch.setattr(module, "_WORTH_A_THREAD", 0)
    monkeypatch.setattr(weights, "_pack_all", fail)
    with pytest.raises(OutOfMemoryError, match="pack"):
        azquant.load(path)


def test_a_broken_tokenizer_is_told_by_encode_not_by_load(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from azquant.engine import model as module

    monkeypatch.setattr(module, "_WORTH_A_THREAD", 0)
    bad = altered(path, tmp_path / "bad.gguf", {keys.TOKENIZER_JSON: keys.string("{")})
    model = azquant.load(bad)
    assert len(model.generate([1, 2], max_tokens=2)) == 2
    with pytest.raises(TokenizerError):
        model.generate("a")
