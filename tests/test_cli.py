"""The command line as a user meets it: what goes to stdout, to stderr, and the exit code."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from convert_support import GPT2_CONFIG, gpt2_tensors, write_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers

import azquant
from azquant import cli as cli_module
from azquant.cli import cli

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
CONFIG = {
    **GPT2_CONFIG,
    "vocab_size": len(ALPHABET) + 1,
    "n_positions": 64,
    "n_inner": 128,
    "bos_token_id": len(ALPHABET),
    "eos_token_id": len(ALPHABET),
}
ENV = {**os.environ, "PYTHONIOENCODING": "utf-8", "COLUMNS": "120"}
PROGRAM = [sys.executable, "-m", "azquant"]


def run(*args: str | Path, **kwargs: Any) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], **kwargs)


def program(*args: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*PROGRAM, *map(str, args)], capture_output=True, timeout=60, env=ENV, **kwargs)


def write_tokenizer(folder: Path) -> None:
    """Byte-level BPE that never merges: a token a byte, and the end."""
    vocabulary = {token: i for i, token in enumerate(ALPHABET)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("cli") / "tiny_hf", CONFIG, gpt2_tensors(CONFIG))
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Path:
    path = checkpoint.parent / "tiny-q4_0.gguf"
    azquant.convert(checkpoint, path, "q4_0")
    return path


# ---- the group ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["", "convert", "inspect", "generate"])
def test_every_help_has_an_example(verb: str) -> None:
    result = run(*[verb][: len(verb)], "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert f"  azquant {verb}" in result.stdout


def test_version() -> None:
    assert run("--version").stdout == f"azquant {azquant.__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom azquant.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'tokenizers', 'rich', 'safetensors', 'azquant.engine'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "set()"


def test_without_a_verb_the_help_goes_to_stderr() -> None:
    result = run()
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Commands:" in result.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["frobnicate"], "No such command 'frobnicate'. Try 'azquant --help'."),
        (["merge", "only-one"], "Missing argument 'DST'. Try 'azquant merge --help'."),
        (["inspect", "x", "--nope"], "No such option"),
        (["generate", "x", "--max-tokens", "many"], "'many' is not a valid integer. Try"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(args: list[str], says: str) -> None:
    result = run(*args, prog_name="azquant")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("azquant: error: ")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


# ---- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["convert", "MISSING", "out.gguf"], "MISSING"),
        (["convert", "CHECKPOINT", "no/such/folder/out.gguf"], "no/such/folder"),
        (["convert", "CHECKPOINT", "out.gguf", "--type", "q9_9"], "q9_9"),
        (["inspect", "MISSING"], "MISSING"),
        (["inspect", "CHECKPOINT"], "folder"),
        (["inspect", "CHECKPOINT/config.json"], "not a GGUF file"),
        (["generate", "CHECKPOINT/config.json", "x"], "not a GGUF file"),
        (["generate", "MODEL", "x", "--temperature", "nan"], "temperature"),
        (["generate", "MODEL", "x", "--max-tokens", "-1"], "max_tokens"),
        (["generate", "MODEL", "x", "--threads", "0"], "threads"),
        (["generate", "MODEL", "1 x 2", "--ids"], "'x' is no token id"),
        (["generate", "MODEL", "--", "-5"], None),  # a prompt that looks like an option is a prompt
        (["generate", "MODEL", "999", "--ids"], "token ids must lie in 0 .. 256"),
        (["generate", "MODEL", "x" * 65], "65 tokens given, but there are 64 positions"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    args: list[str], says: str | None, checkpoint: Path, model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"CHECKPOINT": str(checkpoint), "MODEL": str(model)}
    result = run(*[places.get(arg, arg.replace("CHECKPOINT", str(checkpoint))) for arg in args])
    if says is None:
        assert result.exit_code == 0, result.stderr
        return
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("azquant: error: ")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [["--debug", "inspect", "MISSING"], ["inspect", "MISSING", "--debug"]])
def test_debug_shows_the_traceback_before_or_after_the_verb(args: list[str]) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert "Traceback (most recent call last):" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("azquant: error: MISSING does not exist")


def test_a_bug_is_one_line_and_exit_code_1(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("surprise\n\x1b[2J")

    monkeypatch.setattr(cli_module.inspect, "_print_summary", fail)
    result = run("inspect", model)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("azquant: error: unexpected KeyError: 'surprise")
    assert "run again with --debug and please report it" in result.stderr
    assert "Traceback" in run("inspect", model, "--debug").stderr


def test_ctrl_c_ends_with_130_and_one_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_module.inspect, "_print_summary", interrupt)
    result = run("inspect", model)
    assert (result.exit_code, result.stderr) == (130, "azquant: interrupted\n")


def test_sigint_while_generating(model: Path) -> None:
    """A real signal to a real process that waits for its prompt; a warning tells when it has come so far."""
    with subprocess.Popen(
        [*PROGRAM, "generate", str(model), "-", "--seed", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENV,
    ) as process:
        assert process.stderr is not None
        assert b"no effect" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, b"", b"azquant: interrupted\n")


def test_a_closed_pipe_is_no_traceback(model: Path) -> None:
    command = f'"{sys.executable}" -m azquant inspect "{model}" | true; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("1\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(model: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*PROGRAM, "inspect", str(model)], stdout=full, stderr=subprocess.PIPE, timeout=60
        )
    assert done.returncode == 2
    assert done.stderr == b"azquant: error: cannot write to standard output: No space left on device\n"


# ---- convert -----------------------------------------------------------------------------------------


def test_convert_writes_and_reports(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "a b.gguf"
    result = run("convert", checkpoint, out)
    assert (result.exit_code, result.stderr) == (0, "")
    size = out.stat().st_size
    assert f"wrote {out} ({size:,} bytes)" in result.stdout
    assert f"azquant generate '{out}' 'Azərbaycan'" in result.stdout
    for words in ("bits per weight", "before", "after", "28 F32", "8 q4_0", "1 q8_0", "a bias: always f32"):
        assert words in result.stdout
    assert "\x1b" not in result.stdout


def test_convert_refuses_to_overwrite_until_told(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    out.write_bytes(b"precious")
    result = run("convert", checkpoint, out)
    assert result.exit_code == 2
    assert "exists" in result.stderr
    assert out.read_bytes() == b"precious"
    assert run("convert", checkpoint, out, "--overwrite", "--quiet").output == ""
    assert out.read_bytes()[:4] == b"GGUF"


def test_convert_dry_run_prints_the_plan_and_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    result = run("convert", checkpoint, out, "--dry-run")
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["blk.0.attn_qkv.weight", "192", "x", "64", "F32", "q4_0", "6,912"] in rows
    assert "nothing was written" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("type_", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_convert_json_is_the_report(checkpoint: Path, tmp_path: Path, type_: str) -> None:
    out = tmp_path / "m.gguf"
    report = json.loads(run("convert", checkpoint, out, "--type", type_, "--json").stdout)
    assert report["type"] == type_
    assert report["file_bytes"] == out.stat().st_size
    assert report["tensor_bytes"] == sum(tensor["bytes"] for tensor in report["tensors"])
    assert report["parameters"] == sum(total["parameters"] for total in report["types"].values())
    with azquant.open_gguf(out) as file:
        assert {t["name"]: (tuple(t["shape"]), t["type"]) for t in report["tensors"]} == {
            name: (tensor.shape, tensor.type.name) for name, tensor in file.tensors.items()
        }


def test_warnings_are_one_line_each(tmp_path: Path) -> None:
    config = {**CONFIG, "n_inner": 100}
    folder = write_checkpoint(tmp_path / "odd", config, gpt2_tensors(config))
    result = run("convert", folder, tmp_path / "m.gguf")
    assert result.exit_code == 0
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("azquant: warning: ") for line in lines)
    assert sum("rows of 100 are no whole number of q4_0 blocks" in line for line in lines) == 1
    assert sum("no tokenizer.json" in line for line in lines) == 1
    assert "rows of 100 are no whole number of q4_0 blocks (32)" in result.stdout
    assert "--ids '1 2 3'" in result.stdout  # what such a file can be asked


def test_equal_warnings_are_said_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(*_: Any) -> None:
        for text in ("first\x1b[2J", "second", "first\x1b[2J"):
            warnings.warn(text, azquant.AzquantWarning, stacklevel=1)

    monkeypatch.setattr(cli_module.inspect, "_print_summary", warn)
    result = run("inspect", model, "--no-metadata", "--no-tensors")
    assert result.stderr == "azquant: warning: first\\x1b[2J\nazquant: warning: second\n"


def test_progress_goes_to_the_terminal_only(checkpoint: Path, tmp_path: Path) -> None:
    shown = on_terminal("convert", checkpoint, tmp_path / "bar.gguf")
    assert "writing bar.gguf" in shown
    assert "wrote" in shown
    assert "writing" not in run("convert", checkpoint, tmp_path / "bar2.gguf").output


# ---- generate ----------------------------------------------------------------------------------------


def test_generate_prints_what_the_library_makes(model: Path) -> None:
    text = azquant.load(model).generate("Bakı", max_tokens=12)
    result = run("generate", model, "Bakı", "--max-tokens", "12")
    assert (result.exit_code, result.stdout, result.stderr) == (0, text + "\n", "")
    assert run("generate", model, "Bakı", "--max-tokens", "12", "--echo").stdout == f"Bakı{text}\n"


def test_generate_draws_by_seed(model: Path) -> None:
    options = {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "seed": 7}
    flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    text = azquant.load(model).generate("a", max_tokens=9, **options)
    assert run("generate", model, "a", "--max-tokens", "9", *flags).stdout == text + "\n"


def test_generate_ends_with_what_was_held_back(model: Path) -> None:
    """A character whose last byte never came is shown too, as generate shows it."""
    loaded = azquant.load(model)
    prompt = loaded.tokenizer.encode("a")

    def held_back(seed: int) -> str:
        decoder = loaded.tokenizer.stream_decoder(after=prompt)
        for token in loaded.generate(prompt, max_tokens=3, temperature=5.0, seed=seed):
            decoder.push(token)
        return decoder.flush()

    seed = next(filter(held_back, range(1000)))
    text = loaded.generate("a", max_tokens=3, temperature=5.0, seed=seed)
    assert text.endswith("\ufffd")
    flags = ["--max-tokens", "3", "--temperature", "5", "--seed", str(seed)]
    assert run("generate", model, "a", *flags).stdout == text + "\n"


def test_generate_says_that_greedy_ignores_the_seed(model: Path) -> None:
    result = run("generate", model, "a", "--max-tokens", "1", "--seed", "3")
    assert "no effect at temperature 0" in result.stderr


def test_generate_reads_the_prompt_from_stdin(model: Path) -> None:
    for typed in ("Bakı\n", "Bakı\r\n", "Bakı"):
        done = program("generate", model, "-", "--max-tokens", "1", "--json", input=typed.encode())
        assert json.loads(done.stdout)["prompt"] == "Bakı"
    bad = program("generate", model, "-", input=b"ab\xff")
    assert bad.returncode == 2
    assert bad.stderr == b"azquant: error: the prompt on standard input is not UTF-8 (byte 2)\n"


def test_generate_from_ids(model: Path) -> None:
    ids = azquant.load(model).generate([5, 6, 7], max_tokens=4)
    for prompt in ("5 6 7", "5,6, 7"):
        assert run("generate", model, prompt, "--ids", "--max-tokens", "4").stdout.split() == [
            str(i) for i in ids
        ]


def test_generate_without_a_prompt_begins_at_bos(model: Path) -> None:
    result = json.loads(run("generate", model, "--max-tokens", "2", "--json").stdout)
    assert result["prompt_tokens"] == [len(ALPHABET)]


def test_generate_json(model: Path) -> None:
    result = json.loads(run("generate", model, "ab", "--json", "--max-tokens", "3", "--reproducible").stdout)
    loaded = azquant.load(model, reproducible=True)
    assert result["text"] == loaded.generate("ab", max_tokens=3)
    assert result["tokens"] == loaded.generate(result["prompt_tokens"], max_tokens=3)
    assert result["stop"] == "length"
    assert set(result["seconds"]) == {"load", "prefill", "decode"}


def test_generate_stops_where_the_context_is_full(model: Path) -> None:
    result = json.loads(run("generate", model, "x" * 60, "--json", "--max-tokens", "50").stdout)
    assert result["stop"] == "context"
    assert len(result["tokens"]) == 5  # the last one needs no position


def test_generate_stats_are_on_stderr(model: Path) -> None:
    result = run("generate", model, "abc", "--max-tokens", "6", "--stats")
    load, memory, prefill, decode = result.stderr.splitlines()
    assert load.startswith("azquant: load: ")
    assert memory.startswith("azquant: memory: weights ")
    assert prefill.startswith("azquant: prefill: 3 tokens, ")
    assert decode.startswith("azquant: decode: 5 tokens, ")
    assert decode.endswith(" tokens/s")


def test_the_numpy_backend_is_said_once(model: Path) -> None:
    done = subprocess.run(
        [*PROGRAM, "generate", str(model), "a", "--max-tokens", "2"],
        capture_output=True,
        timeout=60,
        env={**ENV, "AZQUANT_BACKEND": "numpy"},
    )
    assert done.returncode == 0
    assert done.stderr == b"azquant: warning: azquant runs on NumPy: AZQUANT_BACKEND=numpy\n"


def test_a_terminal_gets_the_prompt_and_no_raw_control_characters(model: Path) -> None:
    shown = on_terminal("generate", model, "ab\x1b[2J", "--max-tokens", "3")
    assert "\x1b[2mab\\x1b[2J\x1b[0m" in shown  # the prompt, faint; its own escape sequence spelled out
    assert "\x1b[2J" not in shown


def on_terminal(*args: str | Path) -> str:
    """What the program shows on a terminal 120 columns wide."""
    ours, its = pty.openpty()
    command = [*PROGRAM, *map(str, args)]
    env = {**ENV, "TERM": "xterm-256color"}
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=env) as process:
        os.close(its)
        shown = b""
        while select.select([ours], [], [], 60)[0]:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # Linux's way to say that the other side is gone
                break
            if not piece:
                break
            shown += piece
        assert process.wait(timeout=60) == 0, shown
    os.close(ours)
    return shown.decode()
