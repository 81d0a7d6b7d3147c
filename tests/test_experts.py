"""Mixtures of experts: which expert a token goes to, what conversion makes of them, what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from convert_support import (
    MIXTRAL_CONFIG,
    Tensors,
    as_f32,
    llama_tensors,
    read_metadata,
    read_tensors,
    write_checkpoint,
)
from engine_support import tiny_model

import azquant as aq
from azquant import _backend, _fallback
from azquant.conversion import convert
from azquant.conversion.metadata import size_label
from azquant.errors import ConversionError, ModelError, NonFiniteError
from azquant.evaluate import collect_imatrix
from azquant.program import ProgramBuilder, ProgramSpec
from azquant.types import get_type

native = pytest.importorskip("azquant._native", reason="the C extension is not built")

WIDTH, INNER, COUNT, USED, VOCAB = 32, 24, 6, 3, 7

pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer:azquant.errors.ConversionWarning")

Floats = npt.NDArray[np.float32]

both = pytest.mark.parametrize("module", [native, _fallback], ids=["c", "numpy"])


# ---- the op ------------------------------------------------------------------------------------------


class Mixture:
    """One layer of experts behind an embedding; its output is what a step returns."""

    def __init__(self, module: ModuleType, router: Floats, spoiled: tuple[int, ...] = ()) -> None:
        random = np.random.default_rng(3)
        self.module, self.router = module, router
        self.table = random.normal(size=(VOCAB, WIDTH)).astype(np.float32)
        shapes = ((INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER))
        self.experts = [
            [random.normal(size=s).astype(np.float32) * 0.3 for s in shapes] for _ in range(COUNT)
        ]
        b: ProgramBuilder[Any] = ProgramBuilder()
        x, y, out = b.buffer(WIDTH), b.buffer(WIDTH), b.buffer(WIDTH, outputs=True)
        b.embed(x, self.matrix(self.table))
        given = [
            [np.full_like(w, np.nan) if e in spoiled else w for w in expert]
            for e, expert in enumerate(self.experts)
        ]
        triples: Any = [tuple(map(self.matrix, expert)) for expert in given]
        b.experts(y, x, self.matrix(router), triples, USED, "silu", residual=x)
        b.select(out, y, WIDTH)
        self.spec = b.build(n_layer=1, n_head_kv=1, head_dim=4)

    def matrix(self, w: Floats) -> Any:
        return self.module.Matrix(
            get_type("f32").id, np.ascontiguousarray(w).view(np.uint8).reshape(-1), *w.shape
        )

    def run(self, tokens: list[int]) -> Floats:
        n = len(tokens)
        kv = self.module.KVCache(1, 1, 16, 1, 4, "f32")
        result: Floats = self.module.Program(self.spec).step(kv, "fp32", tokens, [0] * n, range(n), range(n))
        return result

    def expected(self, token: int, chosen: list[int]) -> npt.NDArray[np.float64]:
        x = self.table[token].astype(np.float64)
        ratings = (self.router.astype(np.float64) @ x)[chosen]
        shares = np.exp(ratings - ratings.max())
        y = x.copy()
        for share, e in zip(shares / shares.sum(), chosen, strict=True):
            gate, up, down = (w.astype(np.float64) for w in self.experts[e])
            g = gate @ x
            y += share * (down @ (g / (1 + np.exp(-g)) * (up @ x)))
        return y


def random_router() -> Floats:
    return np.random.default_rng(8).normal(size=(COUNT, WIDTH)).astype(np.float32) * np.float32(0.5)


@both
@pytest.mark.parametrize("tokens", [[2], [0, 1, 2, 3, 4, 5, 6, 2, 2]])
def test_a_token_goes_to_the_experts_rated_highest(module: ModuleType, tokens: list[int]) -> None:
    mixture = Mixture(module, random_router())
    for token, row in zip(tokens, mixture.run(tokens), strict=True):
        chosen = np.argsort(-(mixture.router @ mixture.table[token]))[:USED].tolist()
        assert np.abs(row - mixture.expected(token, chosen)).max() < 1e-4


@both
@pytest.mark.parametrize("tokens", [[2], [1, 2, 3]])
def test_of_equal_ratings_the_first_experts_are_taken(module: ModuleType, tokens: list[int]) -> None:
    for router, chosen in (
        (np.zeros((COUNT, WIDTH), np.float32), [0, 1, 2]),
        (np.repeat(np.eye(2, WIDTH, dtype=np.float32), 3, axis=0), None),
    ):
        mixture = Mixture(module, router)
        for token, row in zip(tokens, mixture.run(tokens), strict=True):
            first = chosen or ([0, 1, 2] if mixture.table[token, 0] > mixture.table[token, 1] else [3, 4, 5])
            assert np.abs(row - mixture.expected(token, first)).max() < 1e-4


@both
@pytest.mark.parametrize("tokens", [[4], [4, 4, 4]])
def test_experts_that_no_token_chose_take_no_part(module: ModuleType, tokens: list[int]) -> None:
    sound = Mixture(module, random_router())
    chosen = np.argsort(-(sound.router @ sound.table[4]))[:USED].tolist()
    spoiled = tuple(e for e in range(COUNT) if e not in chosen)
    assert np.array_equal(Mixture(module, sound.router, spoiled).run(tokens), sound.run(tokens))


@both
def test_a_rating_that_is_no_number_spoils_its_own_token_only(module: ModuleType) -> None:
    sound = Mixture(module, random_router())
    table = sound.table.copy()
    for bad in (np.nan, np.inf):
        table[5, 3] = bad
        ops = (dataclasses.replace(sound.spec.ops[0], w=sound.matrix(table)), *sound.spec.ops[1:])
        spec: ProgramSpec[Any] = dataclasses.replace(sound.spec, ops=ops)
        kv = module.KVCache(1, 1, 16, 1, 4, "f32")
        rows = module.Program(spec).step(kv, "fp32", [1, 5, 2], [0] * 3, range(3), range(3))
        assert np.isnan(rows[1]).any()
        assert np.array_equal(rows[[0, 2]], sound.run([1, 1, 2])[[0, 2]]) or module is _fallback
        assert np.abs(rows[[0, 2]] - sound.run([1, 1, 2])[[0, 2]]).max() < 1e-5


@both
def test_one_broken_rating_among_sound_ones_shows(module: ModuleType) -> None:
    router = random_router()
    router[4] = np.nan
    assert np.isnan(Mixture(module, router).run([1, 2])).all()


# ---- models ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def q4_0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("m"), "mixtral", "q4_0")


def test_both_executors_agree_on_a_q4_0_file(q4_0: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for module in (native, _fallback):
        monkeypatch.setattr(_backend, "_choose", lambda module=module: (module, None))
        _backend.kernels.cache_clear()
        found[module] = aq.load(q4_0, compute="int8", kv_type="f32").logits(list(range(20)))
    monkeypatch.undo()
    _backend.kernels.cache_clear()
    c, numpy = found[native], found[_fallback]
    assert np.linalg.norm(c - numpy) / np.linalg.norm(numpy) < 2e-2


def test_memory_counts_every_expert_and_a_step_those_it_reads(q4_0: Path) -> None:
    model = aq.load(q4_0)
    with aq.open_gguf(q4_0) as file:
        sizes = {name: tensor.nbytes for name, tensor in file.tensors.items()}
    experts = sum(size for name, size in sizes.items() if "_exps" in name)
    assert experts > sum(sizes.values()) // 2
    assert model.memory.weights > 0.95 * sum(sizes.values())
    unread = experts * 6 / 8  # two of eight compute
    embedding = sizes["token_embd.weight"]
    assert model.step_bytes == pytest.approx(sum(sizes.values()) - unread - embedding, rel=0.05)


def test_importances_of_experts_are_refused(q4_0: Path) -> None:
    with pytest.raises(ModelError, match="importances of experts cannot be measured yet"):
        collect_imatrix(q4_0, "a text " * 40, n_ctx=16)


# ---- conversion --------------------------------------------------------------------------------------


def checkpoint(folder: Path, change: Callable[[Tensors], Any] = lambda tensors: None, **config: Any) -> Path:
    values = {**MIXTRAL_CONFIG, **config}
    tensors = llama_tensors(values)
    change(tensors)
    return write_checkpoint(folder / "hf", values, tensors)


MODULE = "model.layers.1.block_sparse_moe"


def test_experts_are_stacked_in_their_order(tmp_path: Path) -> None:
    convert(checkpoint(tmp_path), tmp_path / "out.gguf", "f32")
    tensors = llama_tensors(MIXTRAL_CONFIG)
    for part, name in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        stacked = as_f32(tmp_path / "out.gguf", f"blk.1.ffn_{part}_exps.weight")
        for e, matrix in enumerate(stacked):
            assert np.array_equal(matrix, tensors[f"{MODULE}.experts.{e}.{name}.weight"])
    assert np.array_equal(
        as_f32(tmp_path / "out.gguf", "blk.1.ffn_gate_inp.weight"), tensors[f"{MODULE}.gate.weight"]
    )


@pytest.mark.parametrize("type_", ["q4_0", "q4_k_m", "mxfp4_moe"])
def test_converting_gives_what_quantizing_the_f32_file_gives(tmp_path: Path, type_: str) -> None:
    """llama-quantize's types and bytes, which tests/test_quantize_file.py compares."""
    source = checkpoint(tmp_path, hidden_size=256, intermediate_size=256, num_attention_heads=8)
    convert(source, tmp_path / "f32.gguf", "f32")
    convert(source, tmp_path / "direct.gguf", type_)
    aq.quantize_file(tmp_path / "f32.gguf", tmp_path / "quantized.gguf", type_)
    direct = read_tensors(tmp_path / "direct.gguf")
    assert direct == read_tensors(tmp_path / "quantized.gguf")
    assert direct["blk.0.ffn_gate_inp.weight"][1] == "F32"
    assert direct["blk.0.attn_k.weight"][1] == "Q8_0"  # eight experts


def test_an_adapter_may_change_an_expert(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    a, b = random.normal(size=(2, 64)).astype(np.float32), random.normal(size=(96, 2)).astype(np.float32)
    name = f"{MODULE}.experts.3.w1"
    prefix = f"base_model.model.{name}"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["w1"]}
    lora = write_checkpoint(
        tmp_path / "lora", None, {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    )
    (lora / "model.safetensors").rename(lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    convert(checkpoint(tmp_path), tmp_path / "out.gguf", "f32", lora=lora)
    found = as_f32(tmp_path / "out.gguf", "blk.1.ffn_gate_exps.weight")
    tensors = llama_tensors(MIXTRAL_CONFIG)
    assert np.allclose(found[3], tensors[f"{name}.weight"] + 2 * (b @ a), atol=1e-5)
    assert np.array_equal(found[2], tensors[f"{MODULE}.experts.2.w1.weight"])


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            lambda t: t.pop(f"{MODULE}.experts.7.w2.weight"),
            {},
            rf"tensor {MODULE}\.experts\.7\.w2\.weight is missing",
        ),
        (lambda t: t.pop(f"{MODULE}.gate.weight"), {}, rf"tensor {MODULE}\.gate\.weight is missing"),
        (lambda t: None, {"num_local_experts": 9}, r"experts\.8\.w1\.weight is missing|gate\.weight"),
        (
            lambda t: t.update({f"{MODULE}.experts.8.w1.weight": t[f"{MODULE}.experts.0.w1.weight"]}),
            {},
            r"experts\.8\.w1\.weight would be dropped",
        ),
        (
            lambda t: t.update({f"{MODULE}.experts.5.w3.weight": np.zeros((64, 64), np.float32)}),
            {},
            r"experts\.5\.w3\.weight of .* has shape 64 x 64, but .*num_local_experts=8.* asks for 96 x 64",
        ),
        (
            lambda t: t.update({f"{MODULE}.gate.weight": np.zeros((4, 64), np.float32)}),
            {},
            r"gate\.weight of .* has shape 4 x 64, but .* asks for 8 x 64",
        ),
        (
            lambda t: t.update({f"{MODULE}.experts.5.w3.weight": np.zeros((96, 64), np.int32)}),
            {},
            r"experts\.5\.w3\.weight of .* holds I32",
        ),
    ],
    ids=["expert", "router", "too few", "too many", "shape", "router's shape", "integers"],
)
def test_checkpoints_that_contradict_their_config(
    tmp_path: Path, change: Callable[[Tensors], Any], config: dict[str, Any], message: str
) -> None:
    def and_config(tensors: Tensors) -> None:
        change(tensors)
        if config:
            for name in [n for n in tensors if ".experts.8." in n]:
                del tensors[name]

    with pytest.raises(ConversionError, match=message):
        convert(checkpoint(tmp_path, and_config, **config), tmp_path / "out.gguf", "f32")


def test_a_weight_that_is_no_number_is_found_in_its_expert(tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[f"{MODULE}.experts.6.w2.weight"][3, 5] = np.inf

    with pytest.raises(NonFiniteError, match=r"experts\.6\.w2\.weight of .* holds inf at index \[3, 5\]"):
        convert(checkpoint(tmp_path, spoil), tmp_path / "out.gguf", "q4_0")


@pytest.mark.parametrize(
    ("name", "label", "parts"),
    [
        ("nar", None, {}),
        ("Nar-8x7b-Instruct-v0.1", "8x7B", {"basename": "Nar", "finetune": "Instruct", "version": "v0.1"}),
        ("Nar3-30B-A3B", "30B-A3B", {"basename": "Nar3"}),
        ("Nar-1B", None, {"basename": "Nar"}),
    ],
)
def test_the_size_label_names_the_experts(
    tmp_path: Path, name: str, label: str | None, parts: dict[str, str]
) -> None:
    convert(checkpoint(tmp_path, _name_or_path=name), tmp_path / "out.gguf", "f32")
    found = read_metadata(tmp_path / "out.gguf")
    tensors = llama_tensors(MIXTRAL_CONFIG)
    once = sum(x.size for key, x in tensors.items() if ".experts." not in key or ".experts.0." in key)
    assert found["general.size_label"][1] == (label or size_label(once, 8))
    assert {
        key: found[f"general.{key}"][1]
        for key in ("basename", "finetune", "version")
        if f"general.{key}" in found
    } == parts


@pytest.mark.parametrize(("shared", "expert", "count"), [(1.6e9, 5.6e9, 8), (9e5, 1e5, 128), (1500, 1000, 2)])
def test_size_labels_of_mixtures_are_the_gguf_packages(shared: float, expert: float, count: int) -> None:
    gguf = pytest.importorskip("gguf")
    total = int(shared + expert * count)
    assert size_label(int(shared + expert), count) == gguf.size_label(total, int(shared), int(expert), count)


# ---- files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blk.0.ffn_gate_inp.weight", None, r"blk\.0\.ffn_gate_inp\.weight is missing"),
        ("blk.1.ffn_up_exps.weight", None, r"blk\.1\.ffn_up_exps\.weight is missing"),
        (
            "blk.1.ffn_up_exps.weight",
            (7, 96, 64),
            r"has shape 7 x 96 x 64, but the metadata asks for 8 x 96 x 64",
        ),
        (
            "blk.1.ffn_down_exps.weight",
            (8 * 64, 96),
            r"has shape 512 x 96, but the metadata asks for 8 x 64 x 96",
        ),
        ("blk.1.ffn_gate.weight", (96, 64), r"blk\.1\.ffn_gate\.weight is none that a llama model"),
    ],
)
def test_files_without_what_a_mixture_needs(
    tmp_path: Path, name: str, shape: tuple[int, ...] | None, message: str
) -> None:
    convert(checkpoint(tmp_path), tmp_path / "good.gguf", "f32")
    with aq.open_gguf(tmp_path / "good.gguf") as file:
        metadata = file.copy_metadata()
        held = {
            key: np.frombuffer(t.data, np.float32).reshape(t.shape).copy() for key, t in file.tensors.items()
        }
    held.pop(name, None)
    if shape is not None:
        held[name] = np.zeros(shape, np.float32)
    specs = [aq.gguf.TensorSpec(key, x.shape, get_type("f32")) for key, x in held.items()]
    aq.gguf.write_gguf(tmp_path / "bad.gguf", metadata, specs, lambda spec: [held[spec.name]])
    with pytest.raises(ModelError, match=rf"bad\.gguf: tensor .*{message}"):
        aq.load(tmp_path / "bad.gguf")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("expert_count", 2**31, "expert_count is 2147483648, outside 0 to 1024"),
        ("expert_count", 1, "expert_used_count is 2, outside 1 to 1"),
        ("expert_count", 9, r"ffn_gate_inp\.weight has shape 8 x 64, but the metadata asks for 9 x 64"),
        ("expert_used_count", 9, "expert_used_count is 9, outside 1 to 8"),
        ("expert_used_count", 0, "expert_used_count is 0, outside 1 to 8"),
    ],
)
def test_numbers_of_experts_that_cannot_be_are_refused_with_the_files_name(
    tmp_path: Path, key: str, value: int, message: str
) -> None:
    convert(checkpoint(tmp_path), tmp_path / "good.gguf", "f32")
    with aq.open_gguf(tmp_path / "good.gguf") as file:
        metadata = {**file.copy_metadata(), f"llama.{key}": aq.gguf.keys.u32(value)}
        specs = [aq.gguf.TensorSpec(name, t.shape, t.type) for name, t in file.tensors.items()]
        tensors = file.tensors
        aq.gguf.write_gguf(tmp_path / "bad.gguf", metadata, specs, lambda spec: [tensors[spec.name].data])
    with pytest.raises(ModelError, match=rf"bad\.gguf: .*{message}"):
        aq.load(tmp_path / "bad.gguf")
