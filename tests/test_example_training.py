"""examples/train_az_llm.py really trains: a short run gives a folder that transformers loads."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the training example needs torch")
pytest.importorskip("tokenizers", reason="the training example needs tokenizers")
transformers = pytest.importorskip("transformers", reason="the training example needs transformers")

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "train_az_llm.py"
SMALL = ["--vocab-size", "300", "--n-embd", "32", "--n-layer", "2", "--n-head", "2", "--context", "32"]
SMALL += ["--threads", "1"]
CHECKPOINT = SCRIPT.parent / "az_llm_tiny"
SENTENCE = "Azərbaycan dilində kiçik bir model öyrədirik, o isə söz-söz öyrənir.\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 7 kB of one sentence, which a model of any size can learn."""
    path = tmp_path_factory.mktemp("text") / "az.txt"
    path.write_text(SENTENCE * 90, encoding="utf-8")
    return path


def script(*arguments: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *SMALL, *map(str, arguments)]


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that 60 steps made, and what the script printed."""
    folder = tmp_path_factory.mktemp("trained") / "deep" / "model"
    done = subprocess.run(
        script(text, "--out", folder, "--steps", 60, "--dtype", "bf16"),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def module() -> ModuleType:
    """The script as a module, for what needs no process of its own."""
    spec = importlib.util.spec_from_file_location("train_az_llm", SCRIPT)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def load(folder: Path) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def test_writes_exactly_the_files_of_a_hugging_face_folder(trained: tuple[Path, str]) -> None:
    assert sorted(file.name for file in trained[0].iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_special_ids_are_the_tokenizers_and_not_gpt2s_50256(trained: tuple[Path, str]) -> None:
    config = json.loads((trained[0] / "config.json").read_text(encoding="utf-8"))
    generation = json.loads((trained[0] / "generation_config.json").read_text(encoding="utf-8"))
    _, tokenizer = load(trained[0])
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert end < config["vocab_size"] == len(tokenizer)
    assert {config[key] for key in ("bos_token_id", "eos_token_id")} == {end}
    assert {generation[key] for key in ("bos_token_id", "eos_token_id")} == {end}
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == end


def test_tokenizer_gives_back_any_text(trained: tuple[Path, str]) -> None:
    _, tokenizer = load(trained[0])
    unseen = "  Şəki, Gəncə 📘 «日本»\n\tJsç0"
    assert tokenizer.decode(tokenizer(unseen)["input_ids"]) == unseen
    assert len(tokenizer(" Azərbaycan dilində")["input_ids"]) <= 8  # merges were learned: 21 bytes without


def test_reloaded_model_has_the_printed_held_out_loss(trained: tuple[Path, str], text: Path) -> None:
    """The weights on disk are those the figure was measured on, and they have learned the sentence."""
    folder, printed = trained
    match = re.search(r"held-out loss: [\d.]+ in float32, ([\d.]+) as saved in bf16", printed)
    assert match, printed
    model, tokenizer = load(folder)
    written = text.read_text(encoding="utf-8").strip()
    held = written[written.index("\n", int(len(written) * 0.95)) :].strip()
    end = tokenizer.eos_token_id
    ids = torch.tensor([end, *tokenizer(held)["input_ids"], end])
    total = 0.0
    for start in range(0, len(ids) - 1, 32):
        window = ids[start : start + 33]
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    loss = total / (len(ids) - 1)
    assert loss == pytest.approx(float(match.group(1)), abs=1e-3)
    assert loss < 0.8 * math.log(len(tokenizer))  # guessing blindly would cost log(vocabulary)


def test_stored_dtype_and_shapes(trained: tuple[Path, str]) -> None:
    from safetensors import safe_open

    with safe_open(trained[0] / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert tensors["transformer.wte.weight"].shape == (300, 32)
    assert "lm_head.weight" not in tensors  # tied: stored once


def test_same_seed_same_bytes(module: ModuleType, text: Path, tmp_path: Path) -> None:
    for name, seed in (("one", "1"), ("two", "1"), ("other", "2")):
        options = [str(text), "--out", str(tmp_path / name), "--steps", "3", "--seed", seed]
        assert module.main([*SMALL, *options]) == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "other")]
    assert files[0] == files[1] != files[2]


@pytest.mark.skipif(os.name == "nt", reason="SIGINT cannot be sent to one process on Windows")
def test_ctrl_c_saves_what_there_is(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    command = script(text, "--out", folder, "--steps", 1_000_000)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            for line in process.stdout:
                if line.startswith("training"):
                    break
            process.send_signal(signal.SIGINT)
            rest = process.stdout.read()
            assert process.wait(timeout=60) == 130, process.stderr.read()
        finally:
            process.kill()
    assert "after Ctrl-C" in rest
    model, _ = load(folder)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"\xff\xfe\x00", [], "not UTF-8"),
        (b"One sentence and no more than that.\n", [], "too little prose"),
        (b"def f(x):\n    return x + 1\n" * 50, [], "too little prose"),
        (b"a\nb\nc\n" * 4, ["--every-line", "--held-out", "0.5"], "tokens"),
    ],
)
def test_unusable_text_is_a_message_and_exit_code_2(
    module: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    options: list[str],
    message: str,
) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    assert module.main([*SMALL, str(path), "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_prose_stays_and_the_rest_goes(module: ModuleType) -> None:
    page = """# Gün 39: Modelin İdarə Edilməsi
| :--- | :--- |
VRAM  Video RAM  Təlim zamanı modelin çəkiləri burada saxlanılır.
for i in range(10): print(x[i] ** 2 + y[i] / 3).

"O deyib ki, bu gün yağış yağır."
Qısa.
Niyə də bunlardan istifadə olunmasın?”
"""
    assert module.keep_prose(page).split("\n") == [
        "Təlim zamanı modelin çəkiləri burada saxlanılır.",
        "",
        '"O deyib ki, bu gün yağış yağır."',
        "Niyə də bunlardan istifadə olunmasın?”",
        "",
    ]


def test_half_of_the_windows_begin_with_a_line(module: ModuleType) -> None:
    tokenizer = module.train_tokenizer([SENTENCE * 20], 300)
    ids = module.encode(tokenizer, [SENTENCE * 20])
    firsts = tokenizer.encode(SENTENCE).ids[:4]
    places = [i for i in range(len(ids) - 32) if ids[i : i + 4].tolist() == firsts]
    starts = module.line_starts(tokenizer, ids, 33)
    assert starts.tolist() == places
    assert len(places) > 10
    batch = module.draw_batch(ids, starts, 33, 2000, torch.Generator().manual_seed(3))
    assert batch.shape == (2000, 33)
    at_line = (batch[:, :4] == torch.tensor(firsts)).all(dim=1).float().mean().item()
    assert 0.45 < at_line < 0.6


@pytest.mark.parametrize("options", [["--n-embd", "48"], ["--vocab-size", "256"], ["--steps", "0"]])
def test_impossible_options_are_refused(module: ModuleType, text: Path, options: list[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        module.main([*SMALL, str(text), "--out", "unused", *options])
    assert refusal.value.code == 2


def test_the_committed_checkpoint_is_what_its_readme_says(module: ModuleType, shared_data: Path) -> None:
    """Held-out perplexity of examples/az_llm_tiny, measured anew on the same part of the same texts."""
    if not CHECKPOINT.is_dir():
        pytest.skip("examples/az_llm_tiny is not here")
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 3_000_000
    readme = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"perplexity \*\*([\d.]+)\*\*", readme)
    assert stated, "examples/README.md states no held-out perplexity"
    texts = [
        shared_data / "text" / name for name in re.findall(r"(\S+\.txt)", readme.partition("```")[2])[:4]
    ]
    _, held = module.read_texts(texts, 0.05, False)
    model, tokenizer = load(CHECKPOINT)
    assert model.config.bos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    ids = module.encode(tokenizer.backend_tokenizer, held)
    assert math.exp(module.evaluate(model, ids)) == pytest.approx(float(stated.group(1)), rel=1e-3)
