"""Model management on the command line: a day in the life, and what each verb prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub_server import Hub, serving
from store_support import put_blob, write_gguf_file
from test_cli import checkpoint, run  # noqa: F401 (checkpoint is a fixture)

from azquant.store import Store


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AZQUANT_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def ok(*args: str | Path) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_day_in_the_life(checkpoint: Path, root: Path, tmp_path: Path) -> None:  # noqa: F811
    old, new = tmp_path / "az-llm-v1.0-q4_0.gguf", tmp_path / "az-llm-v1.1-q8_0.gguf"
    ok("convert", checkpoint, old, "--quiet")
    assert ok("create", "az-llm:v1.0", old).startswith("created az-llm:v1.0 (q4_0, ")
    ok("convert", checkpoint, new, "--type", "q8_0", "--quiet")
    ok("create", "az-llm:v1.1", new)
    old.unlink(), new.unlink()
    lines = ok("list").splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["az-llm:v1.0", "az-llm:v1.1"]
    assert " q4_0 " in lines[2] and " q8_0 " in lines[3]
    difference = ok("versions", "az-llm", "v1.0", "v1.1")
    assert "general.file_type" in difference and "q4_0 " in difference and "q8_0 " in difference
    assert "tensors, " in ok("versions", "az-llm")
    assert ok("generate", "az-llm:v1.1", "Bakı", "--max-tokens", "4", "--no-echo")
    assert ok("cp", "az-llm:v1.1", "az-llm").startswith("created az-llm:latest (q8_0, ")
    before = sum(path.stat().st_size for path in (root / "blobs").iterdir())
    assert ok("rm", "az-llm:v1.0").startswith("removed az-llm:v1.0 (")
    assert sum(path.stat().st_size for path in (root / "blobs").iterdir()) < before
    assert ok("store", "check") == f"{root}: no problems\n"


def test_every_verb_that_takes_a_file_takes_a_name(root: Path, tmp_path: Path) -> None:
    gguf = write_gguf_file(tmp_path / "x.gguf")
    ok("create", "m", gguf)
    by_name, by_file = (json.loads(ok("inspect", what, "--json")) for what in ("m", str(gguf)))
    assert by_name.pop("files") == [by_name.pop("file")] == [str(Store(root).path("m"))]
    assert by_file.pop("files") == [by_file.pop("file")] == [str(gguf)]
    assert by_name == by_file
    ok("create", "other", gguf, "--store", tmp_path / "elsewhere")
    assert "tiny" in ok("inspect", "other", "--store", tmp_path / "elsewhere")
    verbs = ("bench", "edit", "eval", "generate", "imatrix", "inspect", "quantize", "split", "verify")
    for verb in verbs:
        result = run(verb, "nothing:v1", "a", "b")
        assert result.exit_code == 2
        assert "nothing:v1 does not exist: neither a file nor a model in the store" in result.stderr, verb
    for option, args in {"--against": ["verify", gguf], "--base": ["eval", gguf, gguf]}.items():
        assert "neither a file nor a model" in run(*args, option, "nothing:v1").stderr


def test_a_file_of_the_store_is_not_edited_in_place(root: Path, tmp_path: Path) -> None:
    ok("create", "m:v1", write_gguf_file(tmp_path / "x.gguf"))
    before = Store(root).path("m:v1").read_bytes()
    result = run("edit", "m:v1", "--set", "general.name", "other")
    assert (
        result.exit_code == 2
        and "belongs to a store of models, where files are never changed" in result.stderr
    )
    assert Store(root).path("m:v1").read_bytes() == before
    ok("edit", "m:v1", tmp_path / "y.gguf", "--set", "general.name", "other")
    ok("create", "m:v2", tmp_path / "y.gguf")
    assert ["general.name", "tiny", "other"] in [
        line.split() for line in ok("versions", "m", "v1", "v2").splitlines()
    ]


def test_show_prints_what_a_model_is_made_of(tmp_path: Path) -> None:
    write_gguf_file(tmp_path / "x.gguf")
    (tmp_path / "Modelfile").write_text(
        "FROM ./x.gguf\nTEMPLATE {{ .Prompt }}\nSYSTEM a\x1b[31mb\nPARAMETER num_ctx 64\nLICENSE MIT\n"
    )
    ok("create", "m", "-f", tmp_path / "Modelfile")
    text = ok("show", "m")
    for word in ("llama", "num_ctx", "64", "{{ .Prompt }}", "MIT", "general.license", "comes from"):
        assert word in text
    assert "\x1b" not in text
    assert ok("show", "m", "--template") == "{{ .Prompt }}\n"
    shown = json.loads(ok("show", "m", "--json"))
    assert shown["run_with"] == {"num_ctx": 64} and shown["types"]["f32"]["tensors"] == 2
    (tmp_path / "again").write_text(ok("show", "m", "--modelfile"))
    assert json.loads(ok("create", "n", "-f", tmp_path / "again", "--json"))["digest"] == shown["digest"]


def test_export_and_import(tmp_path: Path) -> None:
    ok("create", "m:v1", write_gguf_file(tmp_path / "x.gguf"))
    assert ok("export", "m:v1", tmp_path / "stick") == f"wrote {tmp_path / 'stick'}\n"
    assert ok("import", tmp_path / "stick", "n").startswith("imported n:latest (f32, ")
    one, other = json.loads(ok("list", "--json"))
    assert one["digest"] == other["digest"]


def test_check_tells_debris_from_damage(root: Path, tmp_path: Path) -> None:
    ok("create", "m", write_gguf_file(tmp_path / "x.gguf"))
    put_blob(root, b"unused")
    assert "no model refers to this blob" in ok("store", "check")
    assert "removed" in ok("store", "check", "--repair")
    Store(root).path("m").unlink()
    result = run("store", "check", "--json")
    assert result.exit_code == 2
    assert [problem["kind"] for problem in json.loads(result.stdout)] == ["missing"]
    listed = run("list")
    assert listed.exit_code == 0 and "this blob is missing" in listed.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["create", "m"], "give either a GGUF FILE or -f Modelfile"),
        (["create", "../m", "x.gguf"], "model name '../m'"),
        (["create", "m", "missing.gguf"], "missing.gguf does not exist"),
        (["show", "m"], "there is no model m:latest in the store"),
        (["rm", "m"], "there is no model m:latest in the store"),
        (["cp", "m", "n"], "there is no model m:latest in the store"),
        (["versions", "m"], "there is no model m in the store"),
        (["export", "m", "out"], "there is no model m:latest in the store"),
        (["import", "nowhere"], "nowhere is no folder"),
        (["pull", "repo"], "is no place on the Hub; write hf:ORG/REPO"),
    ],
)
def test_errors_are_one_line(args: list[str], message: str) -> None:
    result = run(*args)
    assert result.exit_code == 2 and result.stdout == ""
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_an_empty_store_says_how_to_begin() -> None:
    result = run("list")
    assert result.exit_code == 0 and "azquant create NAME:TAG FILE.gguf" in result.stderr


def test_pull(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    data = write_gguf_file(tmp_path / "x.gguf").read_bytes()
    with serving(Hub({"x-f32.gguf": data})) as hub:
        assert ok("pull", "hf:org/repo", "--endpoint", hub.url).startswith("pulled hf.co/org/repo:f32 (f32, ")
        assert Store(root).path("hf.co/org/repo:f32").read_bytes() == data
        hub.gated = 403
        result = run("pull", "hf:org/repo", "n", "--endpoint", hub.url)
    assert result.exit_code == 2 and "is gated: accept its terms on the Hub" in result.stderr
