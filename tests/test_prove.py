"""The proof of a conversion: right about files that are right, and about one that is not."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from convert_support import GPT2_CONFIG, gpt2_tensors, write_checkpoint
from tokenizer_support import train

import azquant
from azquant.cli import cli
from azquant.conversion import ConversionReport, convert
from azquant.errors import ArgumentError, ConversionWarning
from azquant.evaluate import prove

torch = pytest.importorskip("torch")
from scratch_models import CourseGPT, NanoGPT, logits, randomized, save_nanogpt  # noqa: E402


def quietly(source: Path, out: Path, kind: str, **options: Any) -> ConversionReport:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConversionWarning)
        return convert(source, out, kind, overwrite=True, **options)


@pytest.fixture
def course(tmp_path: Path) -> Path:
    train(vocab_size=420).save(str(tmp_path / "az_llm-tokenizer.json"))
    torch.save(randomized(CourseGPT(vocab=420)).state_dict(), tmp_path / "az_llm_100m_final.pt")
    return tmp_path / "az_llm_100m_final.pt"


def log_softmax(x: Any) -> Any:
    return torch.log_softmax(torch.tensor(x, dtype=torch.float64), -1).numpy()


def test_against_transformers(tmp_path: Path, shared_data: Path) -> None:
    pytest.importorskip("transformers")
    folder = shared_data / "az_llm_small"
    text = folder / "heldout.txt"
    exact = prove(quietly(folder, tmp_path / "f32.gguf", "f32"), text=text, tokens=600)
    assert exact.reference.startswith("transformers ")
    assert (exact.text, exact.tokens) == ("heldout.txt", 600)
    assert exact.distance.max_difference < 1e-3
    assert exact.distance.mean_kl < 1e-8
    assert exact.distance.same_top == 1
    assert exact.llama_cpp is None
    assert exact.tokenizer is not None
    assert exact.tokenizer.wrong_tokens == 0
    coarse = prove(quietly(folder, tmp_path / "q4.gguf", "q4_0"), text=text, tokens=600)
    assert 1e-3 < coarse.distance.mean_kl < 1e-2
    assert 0.9 < coarse.distance.same_top < 1
    own = prove(quietly(folder, tmp_path / "q4.gguf", "q4_0"), text=text, tokens=600, use_transformers=False)
    assert own.reference == "azquant's own program in float32 (as asked)"
    assert own.distance.mean_kl == pytest.approx(coarse.distance.mean_kl, rel=1e-3)


def test_transformers_says_nothing_of_a_config_that_was_mended(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """GPT2Config saves end token 50256 whatever the vocabulary is; transformers warns of it at every load."""
    pytest.importorskip("transformers")
    config = {**GPT2_CONFIG, "model_type": "gpt2", "bos_token_id": 50256, "eos_token_id": 50256}
    folder = write_checkpoint(tmp_path / "hf", config, gpt2_tensors(GPT2_CONFIG))
    assert prove(quietly(folder, tmp_path / "out.gguf", "f32")).reference.startswith("transformers ")
    assert capfd.readouterr().err == ""


def test_a_file_of_other_weights_shows(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = write_checkpoint(tmp_path / "hf", GPT2_CONFIG, gpt2_tensors(GPT2_CONFIG))
    other = write_checkpoint(tmp_path / "other", GPT2_CONFIG, gpt2_tensors(GPT2_CONFIG, seed=1))
    report = quietly(folder, tmp_path / "out.gguf", "f32")
    good = prove(report)
    assert good.text == "random token ids"
    assert good.distance.mean_kl < 1e-6
    quietly(other, tmp_path / "out.gguf", "f32")
    assert prove(report).distance.mean_kl > 1


def test_what_llama_cpp_loses_is_measured(course: Path, tmp_path: Path) -> None:
    """Against torch: the same model with tanh GELU and without its head's bias."""
    tokenizer = course.parent / "az_llm-tokenizer.json"
    report = quietly(course, tmp_path / "c.gguf", "f32", tokenizer=tokenizer)
    proof = prove(report, tokens=128, tokenizer=tokenizer)
    assert proof.reference == "azquant's own program in float32 (transformers does not know this layout)"
    assert proof.distance.mean_kl < 1e-9
    assert proof.llama_cpp is not None
    model = azquant.load(tmp_path / "c.gguf")
    from azquant.conversion.sample import SAMPLE

    ids: list[int] = []
    for text in SAMPLE:
        ids += model.tokenizer.encode(text)
    ids = ids[:128]
    exact = randomized(CourseGPT(vocab=420))
    state = exact.state_dict()
    lossy = CourseGPT(torch.nn.GELU("tanh"), vocab=420).eval()
    lossy.load_state_dict({**state, "lm_head.bias": torch.zeros(420)})
    p, q = log_softmax(logits(exact, ids)), log_softmax(logits(lossy, ids))
    assert proof.llama_cpp.mean_kl == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=1e-3)
    assert proof.llama_cpp.same_top == (p.argmax(1) == q.argmax(1)).mean()


def test_relu_and_gelu_cost_llama_cpp_little(tmp_path: Path) -> None:
    """The scaled ReLU is nearer to itself than ReLU taken for GELU would be by far."""
    losses = {}
    for name, activation in (("gelu", torch.nn.GELU()), ("relu", torch.nn.ReLU())):
        model = randomized(CourseGPT(activation))
        with torch.no_grad():
            model.lm_head.bias.zero_()
        torch.save(model.state_dict(), tmp_path / "m.pt")
        report = quietly(tmp_path / "m.pt", tmp_path / f"{name}.gguf", "f32", activation=name)
        proof = prove(report, activation=name)
        assert proof.llama_cpp is not None
        losses[name] = proof.llama_cpp.mean_kl
    assert losses["gelu"] < 1e-5
    assert losses["relu"] < 1e-3
    as_gelu = quietly(tmp_path / "m.pt", tmp_path / "wrong.gguf", "f32", activation="gelu_tanh")
    assert prove(as_gelu, activation="relu").distance.mean_kl > 30 * losses["relu"]


def test_coverage(tmp_path: Path, course: Path) -> None:
    report = quietly(course, tmp_path / "c.gguf", "q4_0")
    state = torch.load(course, weights_only=True)
    coverage = report.coverage
    assert coverage.total == len(state)
    assert not coverage.twice
    assert {name for name, _ in coverage.left_out} == {
        name for name in state if name.endswith("tril") or name == "lm_head.bias"
    }
    assert dict(coverage.left_out)["lm_head.bias"] == "in the metadata"
    assert "blocks.1.sa.heads.3.value.weight" in coverage.once
    nano = save_nanogpt(tmp_path / "ckpt.pt", randomized(NanoGPT()))
    assert quietly(nano, tmp_path / "n.gguf", "f32").coverage.left_out == (
        ("lm_head.weight", "equal to the embedding"),
    )


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    folder = write_checkpoint(tmp_path / "hf", GPT2_CONFIG, gpt2_tensors(GPT2_CONFIG))
    proof = prove(quietly(folder, tmp_path / "out.gguf", "f32"))
    assert proof.reference == "azquant's own program in float32 (transformers and torch are not installed)"


def test_what_cannot_be_proved(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", GPT2_CONFIG, gpt2_tensors(GPT2_CONFIG))
    with pytest.raises(ArgumentError, match="dry run"):
        prove(quietly(folder, tmp_path / "out.gguf", "f32", dry_run=True))
    report = quietly(folder, tmp_path / "out.gguf", "f32")
    with pytest.raises(ArgumentError, match="tokens=1"):
        prove(report, tokens=1)


def _trained(activation: Any, ids: Any) -> CourseGPT:
    """A few seconds' training, one thread: with two, torch waits long for a core that others use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = CourseGPT(activation, vocab=420).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        starts = torch.randint(0, len(ids) - 49, (8,))
        x, y = (torch.stack([ids[at + shift : at + shift + 48] for at in starts]) for shift in (0, 1))
        loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return model


def test_a_wrong_activation_shows_on_the_models_own_text(tmp_path: Path, shared_data: Path) -> None:
    text = (shared_data / "text" / "ntrex-aze-Latn.txt").read_text(encoding="utf-8")[:120_000]
    (tmp_path / "held.txt").write_text(text[-8_000:], encoding="utf-8")
    tokenizer = train(vocab_size=420)
    tokenizer.save(str(tmp_path / "t.json"))
    ids = torch.tensor(tokenizer.encode(text[:-8_000]).ids)
    torch.save(_trained(torch.nn.ReLU(), ids).state_dict(), tmp_path / "m.pt")
    options: dict[str, Any] = {"tokenizer": tmp_path / "t.json"}
    report = quietly(tmp_path / "m.pt", tmp_path / "m.gguf", "f32", **options)
    proof = prove(report, text=tmp_path / "held.txt", tokens=768, **options)  # GELU was assumed
    assert len(proof.alternatives) == 3
    assert proof.better is not None
    assert proof.better.options["activation"] == "relu"
    assert prove(report, tokens=64, **options).alternatives == ()  # not on text that is not its own
    options["activation"] = "relu"
    report = quietly(tmp_path / "m.pt", tmp_path / "m.gguf", "f32", **options)
    proof = prove(report, text=tmp_path / "held.txt", tokens=768, **options)
    assert [item.options for item in proof.alternatives] == [{"attention_scale": "embedding"}]
    assert proof.better is None


# The command


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["convert", *map(str, arguments)])


def test_the_courses_one_call(course: Path, tmp_path: Path) -> None:
    out = tmp_path / "az-llm.gguf"
    tokenizer = course.parent / "az_llm-tokenizer.json"
    done = run(course, "--tokenizer", tokenizer, "-o", out)
    assert done.exit_code == 0, done.output
    assert "tokens of azquant's sample are the same" in done.output
    assert "llama.cpp against azquant" in done.output
    assert "not as tensors" in done.output
    done = run(course, out, "--overwrite", "--json", "--no-prove", "--tokenizer", tokenizer)
    assert json.loads(done.stdout)["proof"] is None
    options = ("--activation", "relu", "--attention-scale", "embedding", "--strict", "--prove")
    done = run(course, out, "--overwrite", "--json", "--tokenizer", tokenizer, *options)
    proof = json.loads(done.stdout)["proof"]
    assert proof["tokenizer"]["wrong_tokens"] == 0
    assert proof["tensors"]["total"] == 58
    assert proof["mean_kl"] < 0.1


def test_strict_and_a_corpus_of_ones_own(tmp_path: Path, course: Path) -> None:
    from tokenizers import Tokenizer, normalizers

    path = course.parent / "az_llm-tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(path))
    out = tmp_path / "out.gguf"
    done = run(course, out, "--tokenizer", path, "--strict")
    assert done.exit_code == 2
    assert not out.exists()
    (tmp_path / "corpus.txt").write_text("SALAM, dünya! " * 40, encoding="utf-8")
    done = run(course, out, "--tokenizer", path, "--corpus", tmp_path / "corpus.txt")
    assert "tokens of corpus.txt differ" in done.output
    assert "corpus.txt; the checkpoint run by" in done.output


def test_two_outputs_are_one_too_many(course: Path) -> None:
    assert run(course, "a.gguf", "-o", "b.gguf").exit_code == 2
