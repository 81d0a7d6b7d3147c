"""Perplexity and divergence, judged by llama-perplexity's figures and by torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_support import tiny_model

import azquant
from azquant.engine import Model
from azquant.errors import ArgumentError, MissingDependencyError, OutputError
from azquant.evaluate import Perplexity, evaluate, plot_positions
from azquant.gguf import MetadataValue, TensorSpec, keys, open_gguf, write_gguf
from azquant.types import get_type


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("m"), "gpt2", "q8_0", n_positions=64)


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    return azquant.load(path, reproducible=True)  # however many windows a step takes


def text_of(n: int) -> str:
    return "".join(chr(97 + i) for i in np.random.default_rng(3).integers(0, 26, n))


# ---- against llama-perplexity, context 256


def test_stories260k(shared_data: Path) -> None:
    text = (shared_data / "text/the-verdict.txt").read_bytes().decode()
    found, _ = evaluate(shared_data / "stories260K/stories260K-F32.gguf", text, n_ctx=256)
    assert found.perplexity == pytest.approx(35.8275, rel=1e-4)
    assert found.error == pytest.approx(1.43161, rel=1e-3)


# llama-perplexity -c 256 on heldout.txt: PPL, and mean KL and share of equal top tokens against F32 logits.
# The figures are those of shared/data/README.md.
AZ_LLM_SMALL: dict[str, tuple[float, float, float]] = {
    "q8_0": (74.2773, 0.000140, 0.9868),
    "q4_0 pure": (75.3415, 0.013766, 0.8790),
}


def pure_q4_0(source: Path, target: Path) -> Path:
    """What llama-quantize --pure makes of an F32 file: every matrix but the positions in Q4_0."""
    with open_gguf(source) as file:
        tensors = file.tensors

        def type_of(name: str) -> str:
            return "q4_0" if len(tensors[name].shape) == 2 and name != "position_embd.weight" else "f32"

        def data(spec: TensorSpec) -> Any:
            tensor = tensors[spec.name]
            values = np.frombuffer(tensor.data, dtype="<f4").reshape(tensor.shape)
            return [values if spec.type == get_type("f32") else azquant.quantize(values, "q4_0").data]

        kept = {
            key: keys.array(value.element_type, value[:])  # type: ignore[union-attr]
            if hasattr(value, "element_type")
            else MetadataValue(file.metadata_types[key], value)
            for key, value in file.metadata.items()
        }
        specs = [TensorSpec(name, tuple(t.shape), get_type(type_of(name))) for name, t in tensors.items()]
        write_gguf(target, kept, specs, data)
    return target


def test_az_llm_small(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "az_llm_small"
    text = (source / "heldout.txt").read_bytes().decode()
    f32 = tmp_path / "f32.gguf"
    azquant.convert(source, f32, "f32")
    azquant.convert(source, tmp_path / "q8_0.gguf", "q8_0")
    files = {"q8_0": tmp_path / "q8_0.gguf", "q4_0 pure": pure_q4_0(f32, tmp_path / "pure.gguf")}
    for name, (perplexity, kl, same_top) in AZ_LLM_SMALL.items():
        # Once against the file and once against the folder it came from: the same base.
        found, divergence = evaluate(files[name], text, base=f32 if name == "q8_0" else source)
        assert divergence is not None
        assert divergence.base.perplexity == pytest.approx(74.2645, rel=1e-3)
        assert found.perplexity == pytest.approx(perplexity, rel=5e-3)
        assert divergence.kl.mean() == pytest.approx(kl, rel=0.1)
        assert divergence.same_top.mean() == pytest.approx(same_top, abs=0.01)


# ---- against arithmetic done by torch


@pytest.mark.parametrize("n_ctx", [16, 21, 64])
def test_the_windows(model: Model, n_ctx: int) -> None:
    text = text_of(200)
    found, _ = evaluate(model, text, n_ctx=n_ctx)
    tokens = model.tokenizer.encode(text)
    first, nll = n_ctx // 2, []
    for start in range(0, len(tokens) // n_ctx * n_ctx, n_ctx):
        window = tokens[start : start + n_ctx]
        logits = torch.tensor(model.logits(window), dtype=torch.float64)
        losses = torch.nn.functional.cross_entropy(
            logits[first:-1], torch.tensor(window[first + 1 :]), reduction="none"
        )
        nll.append(losses.numpy())
    np.testing.assert_allclose(found.nll, np.stack(nll), rtol=1e-4)
    assert found.perplexity == pytest.approx(math.exp(np.mean(nll)), rel=1e-6)
    assert found.as_dict()["tokens_counted"] == len(nll) * (n_ctx - first - 1)


def test_divergence(tmp_path: Path, path: Path) -> None:
    q4_0 = tiny_model(tmp_path, "gpt2", "q4_0", n_positions=64)
    base, other = (azquant.load(file, reproducible=True) for file in (path, q4_0))
    text = text_of(130)
    _, found = evaluate(other, text, base=base, n_ctx=32, chunks=3)
    assert found is not None
    assert found.kl.shape == (3, 15)
    tokens = base.tokenizer.encode(text)[64:96]
    p, q = (
        torch.log_softmax(torch.tensor(m.logits(tokens)[16:-1], dtype=torch.float64), -1)
        for m in (base, other)
    )
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(found.kl[2], expected.numpy(), rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(found.same_top[2], (p.argmax(-1) == q.argmax(-1)).numpy())


def test_a_file_and_itself(path: Path) -> None:
    found, divergence = evaluate(path, text_of(130), base=path)
    assert divergence is not None
    report = divergence.as_dict()
    assert (report["mean_kl"], report["max_kl"], report["same_top"]) == (0, 0, 1)
    assert report["base"] == found.as_dict()


def test_bos_begins_every_window(shared_data: Path) -> None:
    model = azquant.load(shared_data / "stories260K/stories260K-F32.gguf")
    from azquant.evaluate.windows import cut, text_tokens

    windows = cut(model, text_tokens(model, "Once upon a time there was a little girl. " * 20), 32)
    assert len(windows.tokens) > 3
    assert (windows.tokens[:, 0] == model.tokenizer.bos_id).all()


def test_progress_and_chunks(model: Model) -> None:
    told: list[tuple[int, int]] = []
    found, _ = evaluate(
        model, text_of(200), n_ctx=16, chunks=4, progress=lambda done, total: told.append((done, total))
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(found.nll) == 4


@pytest.mark.parametrize(
    "options",
    [{"n_ctx": 3}, {"n_ctx": -1}, {"n_ctx": 65}, {"n_ctx": 1.5}, {"chunks": 0}, {"chunks": "1"}],
    ids=str,
)
def test_wrong_arguments(model: Model, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        evaluate(model, text_of(200), **options)


def test_too_short_a_text(model: Model) -> None:
    with pytest.raises(ArgumentError, match="the text has 63 tokens, a window 64"):
        evaluate(model, text_of(63))


def test_a_base_of_another_vocabulary(model: Model, shared_data: Path) -> None:
    with pytest.raises(ArgumentError, match="vocabularies differ"):
        evaluate(model, text_of(200), base=shared_data / "stories260K/stories260K-F32.gguf")


# ---- pictures


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # matplotlib's and its dependencies' own
def test_plot(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found, divergence = evaluate(path, text_of(200), base=path, n_ctx=32)
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        plot_positions(tmp_path / name, found, divergence, title="ə <b>")
        assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(OutputError):
        plot_positions(tmp_path / "no" / "a.png", found)


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = Perplexity(np.ones((2, 5)), 12, 6, 24)
    with pytest.raises(ArgumentError, match=r"\.png"):
        plot_positions(tmp_path / "a.txt", found)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"azquant\[plot\]"):
        plot_positions(tmp_path / "a.png", found)
    assert not list(tmp_path.iterdir())
