"""The store: Ollama's layout read and written, and each verb of model management."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from convert_support import GPT2_CONFIG, gpt2_tensors, write_checkpoint
from store_support import CONFIG, IMAGE, blobs, digest, files, put_blob, put_model, tiny_gguf, write_gguf_file

import azquant as aq
from azquant.errors import ConversionError, ConversionWarning, InputFileError, ModelNotFoundError, OutputError
from azquant.gguf import split_gguf
from azquant.store import ModelName, Store, default_root, go_json, ollama_root, resolve
from azquant.store.build import human_count
from azquant.store.layout import sha256
from azquant.store.manifest import Layer, Manifest, parse_manifest

# Public facts about the model llama3.2 of Ollama's library: the digests and sizes in its manifest, and the
# ID that `ollama list` prints for it (how the manifest's SHA-256 begins). Its files are not needed.
LLAMA32 = [
    ("model", "dde5aa3fc5ffc17176b5e8bdc82f587b24b2678c6c66101bf7da77af9f7ccdff", 2019377376),
    ("template", "966de95ca8a62200913e3f8bfbf84c8494536f1b94b49166851e76644e966396", 1429),
    ("license", "fcc5a6bec9daf9b561a68827b67ab6088e1dba9d1fa2a50d7bbcc8384e0a265d", 7711),
    ("license", "a70ff7e570d97baaf4e62ac6e6ad9975e04caa6d900d3742d37698494479e0cd", 6016),
    ("params", "56bb8bd477a519ffa694fc449c2413c6f0e1d3b1c88fa7e3c9d88d3ae49d4dcb", 96),
]
LLAMA32_CONFIG = "34bb5ab01051a11372a91f95f3fbbc51173eed8e7f13ec395b9ae9b8bd0e242b"
LLAMA32_ID = "a80c4f17acd5"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf_file(tmp_path / "one.gguf")


# ---- the same bytes as Ollama ------------------------------------------------------------------------


def test_parameters_have_the_digest_that_ollama_publishes() -> None:
    stops = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    assert digest(go_json.encode({"stop": stops})) == "sha256:" + LLAMA32[-1][1]


def test_config_and_manifest_have_the_digests_that_ollama_publishes() -> None:
    config = {
        "model_format": "gguf",
        "model_family": "llama",
        "model_families": ["llama"],
        "model_type": human_count(3212749888),
        "file_type": "Q4_K_M",
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hexadecimal for _, hexadecimal, _ in LLAMA32]},
    }
    data = go_json.encode(config)
    assert sha256(data) == "sha256:" + LLAMA32_CONFIG
    layers = tuple(Layer(IMAGE + kind, "sha256:" + digits, size) for kind, digits, size in LLAMA32)
    encoded = Manifest(Layer(CONFIG, sha256(data), len(data)), layers).encode()
    # The registry's copy has no newline at the end; what `ollama create` writes has.
    assert sha256(encoded.removesuffix(b"\n")).startswith("sha256:" + LLAMA32_ID)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.7, "0.7"),
        (1.0, "1"),
        (0.0, "0"),
        (1e-5, "0.00001"),
        (1e-7, "1e-7"),
        (2.5e-9, "2.5e-9"),
        (1e20, "100000000000000000000"),
        (1e21, "1e+21"),
        (-0.1, "-0.1"),
        (4096, "4096"),
        (True, "true"),
        ("<ə&>\n\u2028", '"\\u003cə\\u0026\\u003e\\n\\u2028"'),
    ],
)
def test_json_is_written_as_go_writes_it(value: object, text: str) -> None:
    assert go_json.encode(value).decode() == text + "\n"


@pytest.mark.parametrize(
    ("n", "text"),
    [(134515008, "134.52M"), (3212749888, "3.2B"), (7_000_000_000, "7B"), (293_000, "293K"), (7, "7")],
)
def test_parameters_are_counted_in_ollamas_words(n: int, text: str) -> None:
    assert human_count(n) == text


def test_a_created_model_has_ollamas_layout_digests_and_media_types(store: Store, tmp_path: Path) -> None:
    model = write_gguf_file(tmp_path / "model.gguf")
    (tmp_path / "Modelfile").write_text(
        'FROM ./model.gguf\nTEMPLATE "{{ .Prompt }}"\nSYSTEM Sən köməkçisən.\nLICENSE MIT\n'
        'PARAMETER stop "<|end|>"\nPARAMETER temperature 0.7\nMESSAGE user Salam\nMESSAGE assistant Salam!\n'
    )
    store.create("az-llm:v1.0", tmp_path / "Modelfile", modelfile=True)
    texts = {
        "model": model.read_bytes(),
        "template": b"{{ .Prompt }}",
        "system": "Sən köməkçisən.".encode(),
        "license": b"MIT",
        "params": b'{"stop":["\\u003c|end|\\u003e"],"temperature":0.7}\n',
        "messages": b'[{"role":"user","content":"Salam"},{"role":"assistant","content":"Salam!"}]\n',
    }
    path = store.root / "manifests" / "registry.ollama.ai" / "library" / "az-llm" / "v1.0"
    manifest = json.loads(path.read_bytes())
    assert manifest["schemaVersion"] == 2
    assert manifest["mediaType"] == "application/vnd.docker.distribution.manifest.v2+json"
    assert manifest["layers"] == [
        {"mediaType": IMAGE + kind, "digest": digest(data), "size": len(data)} for kind, data in texts.items()
    ]
    for data in texts.values():
        assert (store.root / "blobs" / digest(data).replace(":", "-")).read_bytes() == data
    config = (store.root / "blobs" / manifest["config"]["digest"].replace(":", "-")).read_bytes()
    assert manifest["config"] == {"mediaType": CONFIG, "digest": digest(config), "size": len(config)}
    assert json.loads(config)["rootfs"]["diff_ids"] == [layer["digest"] for layer in manifest["layers"]]
    assert json.loads(config)["file_type"] == "F32"
    assert store.check() == []


# ---- an existing store of Ollama ---------------------------------------------------------------------


@pytest.fixture
def ollama(tmp_path: Path) -> Path:
    """A store made by hand, with a model of the library and one of a user."""
    root = tmp_path / "ollama"
    layers = [
        ("model", tiny_gguf()),
        ("template", b"{{ .Prompt }}"),
        ("system", b"Be brief."),
        ("params", b'{"num_ctx":256,"stop":["a","b"],"temperature":0.5}'),
        ("license", b"MIT"),
    ]
    put_model(root, "tiny", "latest", layers)
    put_model(root, "other", "v2", [("model", tiny_gguf(2.0))], where=("hf.co", "someone"))
    return root


def test_a_store_of_ollama_is_listed_and_shown(ollama: Path) -> None:
    store = Store(ollama)
    rows = store.list()
    assert [str(row.name) for row in rows] == ["hf.co/someone/other:v2", "tiny:latest"]
    tiny = rows[1]
    assert (tiny.type, tiny.parameters, tiny.bits_per_weight, tiny.problem) == ("f32", 40, 32.0, None)
    info = store.show("tiny")
    assert info.parameters == {"num_ctx": 256, "stop": ["a", "b"], "temperature": 0.5}
    assert (info.template, info.system, info.licenses) == ("{{ .Prompt }}", "Be brief.", ("MIT",))
    assert info.metadata["general.name"] == "tiny"
    assert info.provenance == {"general.license": "mit"}
    assert info.path == ollama / "blobs" / digest(tiny_gguf()).replace(":", "-")


def test_reading_a_store_writes_nothing(ollama: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in ollama.rglob("*")}
    store = Store(ollama)
    store.list(), store.show("tiny"), store.versions("tiny"), store.path("tiny"), store.check()
    assert {path: path.stat().st_mtime_ns for path in ollama.rglob("*")} == before


def test_a_model_of_ollama_can_be_a_base_and_is_left_as_it_was(ollama: Path, tmp_path: Path) -> None:
    store, before = Store(ollama), files(ollama)
    (tmp_path / "Modelfile").write_text("FROM tiny\nSYSTEM Other.\nPARAMETER temperature 1\nLICENSE Apache\n")
    store.create("derived", tmp_path / "Modelfile", modelfile=True)
    info = store.show("derived")
    assert info.system == "Other." and info.template == "{{ .Prompt }}"
    assert info.parameters == {"num_ctx": 256, "stop": ["a", "b"], "temperature": 1}
    assert info.licenses == ("MIT", "Apache")
    assert before.items() <= files(ollama).items()


def test_newer_ollamas_links_to_manifests_are_read_replaced_and_kept_from_collection(ollama: Path) -> None:
    old = ollama / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "latest"
    data = old.read_bytes()
    blob = put_blob(ollama, data).replace(":", "-")
    old.unlink()
    link = ollama / "manifests-v2" / "registry.ollama.ai" / "library" / "tiny" / "latest"
    link.parent.mkdir(parents=True)
    link.symlink_to(os.path.relpath(ollama / "blobs" / blob, link.parent))
    store = Store(ollama)
    assert store.show("tiny").system == "Be brief."
    store.rm("hf.co/someone/other:v2")
    assert (ollama / "blobs" / blob).exists() and store.check() == []
    store.cp("tiny", "copy")
    store.create("tiny", write_gguf_file(ollama.parent / "new.gguf", 3.0), overwrite=True)
    assert not link.exists() and not link.is_symlink(), "newer Ollama would still read the old manifest"
    assert store.show("tiny").system is None and store.show("copy").system == "Be brief."
    assert store.check() == []


def test_a_list_of_manifests_keeps_all_its_blobs(ollama: Path) -> None:
    path = ollama / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "latest"
    child = put_blob(ollama, path.read_bytes())
    path.write_text(
        json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": "application/vnd.ollama.manifest.list.v2+json",
                "manifests": [{"mediaType": "x", "digest": child, "runner": "ollama"}],
            }
        )
    )
    store = Store(ollama)
    assert store.show("tiny").system == "Be brief."
    store.rm("hf.co/someone/other:v2")
    assert store.check() == []
    store.rm("tiny")
    assert blobs(ollama) == set()


def test_names_count_the_same_in_either_case(ollama: Path, tmp_path: Path) -> None:
    store = Store(ollama)
    assert store.show("TINY").system == "Be brief."
    with pytest.raises(OutputError, match="already exists"):
        store.create("Tiny", write_gguf_file(tmp_path / "x.gguf"))


def test_a_converted_model_is_loaded_from_the_store(store: Store, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "hf", GPT2_CONFIG, gpt2_tensors(GPT2_CONFIG))
    with pytest.warns(ConversionWarning, match="no tokenizer"):
        aq.convert(checkpoint, tmp_path / "m.gguf", type="q4_0")
    store.create("gpt:v1", tmp_path / "m.gguf")
    assert store.show("gpt:v1").row.type == "q4_0"
    direct = aq.load(tmp_path / "m.gguf").logits([1, 2, 3])
    assert (aq.load(store.path("gpt:v1")).logits([1, 2, 3]) == direct).all()


def test_a_file_alone_gets_the_settings_that_its_metadata_tells(store: Store, tmp_path: Path) -> None:
    """A base model takes the prompt as it is, and no more of it than it has positions."""
    checkpoint = write_checkpoint(tmp_path / "hf", GPT2_CONFIG, gpt2_tensors(GPT2_CONFIG))
    with pytest.warns(ConversionWarning, match="no tokenizer"):
        aq.convert(checkpoint, tmp_path / "m.gguf", type="q4_0")
    store.create("m", tmp_path / "m.gguf")
    info = store.show("m")
    assert info.template == "{{ .Prompt }}"
    assert info.parameters["num_ctx"] == GPT2_CONFIG["n_positions"]


def test_a_split_model_must_be_merged_first(store: Store, tmp_path: Path) -> None:
    split_gguf(write_gguf_file(tmp_path / "x.gguf"), tmp_path / "part", max_tensors=1)
    with pytest.raises(ConversionError, match=r"is one of 2 files; run `azquant merge` first"):
        store.create("m", tmp_path / "part-00001-of-00002.gguf")
    assert files(store.root) == {}


# ---- verbs -------------------------------------------------------------------------------------------


def test_a_file_is_kept_once_and_goes_with_its_last_model(store: Store, gguf: Path) -> None:
    store.create("a:1", gguf)
    store.create("b:1", gguf)
    store.cp("a:1", "a:2")
    assert [
        path.name for path in (store.root / "blobs").iterdir() if path.stat().st_size == len(tiny_gguf())
    ] == [store.path("a:1").name]
    assert store.rm("a:1") == [] and store.rm("b:1") == []
    path = store.path("a:2")
    assert path in store.rm("a:2")
    assert files(store.root) == {}
    assert list((store.root / "manifests").iterdir()) == []


def test_a_name_that_is_taken_is_not_replaced_unasked(store: Store, gguf: Path, tmp_path: Path) -> None:
    store.create("a:1", gguf)
    store.create("b:1", write_gguf_file(tmp_path / "two.gguf", 2.0))
    before = files(store.root)
    for attempt in (lambda: store.create("a:1", gguf), lambda: store.cp("b:1", "a:1")):
        with pytest.raises(OutputError, match=r"a:1 already exists; choose another tag"):
            attempt()
    assert files(store.root) == before
    store.cp("b:1", "a:1", overwrite=True)
    assert store.path("a:1") == store.path("b:1")
    assert store.check() == [], "what was replaced is gone"


def test_versions_and_what_changed_between_them(store: Store, gguf: Path, tmp_path: Path) -> None:
    store.create("m:v1.0", gguf)
    os.utime(store.root / "manifests/registry.ollama.ai/library/m/v1.0", (1, 1))
    (tmp_path / "Modelfile").write_text("FROM ./two.gguf\nPARAMETER num_ctx 64\n")
    write_gguf_file(tmp_path / "two.gguf", 2.0, name="tiny two")
    store.create("m:v1.1", tmp_path / "Modelfile", modelfile=True)
    assert [row.name.tag for row in store.versions("m")] == ["v1.0", "v1.1"]
    found = store.compare("m:v1.0", "m:v1.1")
    assert [change.name for change in found.tensors] == ["a.weight"]
    assert found.tensors[0].before["sha256"] != found.tensors[0].after["sha256"]
    assert found.tensors[0].after["shape"] == [4, 8] and found.same_tensors == 1
    assert [(c.name, c.before, c.after) for c in found.metadata] == [("general.name", "tiny", "tiny two")]
    assert [(c.name, c.before, c.after) for c in found.settings] == [("PARAMETER num_ctx", None, 64)]
    assert store.compare("m:v1.0", "m:v1.0").is_same
    with pytest.raises(ModelNotFoundError, match=r"no model m:v9 in the store .*; it has v1.0, v1.1"):
        store.show("m:v9")


def test_export_and_import_give_equal_digests(store: Store, tmp_path: Path) -> None:
    write_gguf_file(tmp_path / "one.gguf")
    (tmp_path / "Modelfile").write_text(
        'FROM ./one.gguf\nSYSTEM """two\nlines"""\nLICENSE A\nLICENSE B\nPARAMETER stop x\n'
    )
    row = store.create("m:v1", tmp_path / "Modelfile", modelfile=True)
    folder = store.export("m:v1", tmp_path / "stick")
    names = {path.name for path in folder.iterdir()}
    assert names >= {"model.gguf", "Modelfile", "SHA256SUMS", "license.txt", "license-2.txt", "params.json"}
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    other = Store(tmp_path / "elsewhere")
    again = other.import_(folder)
    assert (again.name, again.digest) == (row.name, row.digest)
    assert files(other.root) == files(store.root)
    assert other.import_(folder, "else:where").digest == row.digest
    # and Ollama's way in, from the Modelfile
    third = Store(tmp_path / "third")
    assert third.create("m:v1", folder / "Modelfile", modelfile=True).digest == row.digest


def test_the_modelfile_shown_makes_the_same_model(store: Store, tmp_path: Path) -> None:
    write_gguf_file(tmp_path / "one.gguf")
    (tmp_path / "Modelfile").write_text(
        'FROM ./one.gguf\nTEMPLATE """\n{{ .System }} "quoted"\n"""\nSYSTEM "  spaces  "\nPARAMETER stop "\\"'
        '\nPARAMETER stop " x"\nPARAMETER use_mmap true\nPARAMETER top_p 0.1\nMESSAGE user a: b\n'
    )
    row = store.create("m:v1", tmp_path / "Modelfile", modelfile=True)
    (tmp_path / "again").write_text(str(store.show("m:v1").modelfile))
    assert store.create("m:v2", tmp_path / "again", modelfile=True).digest == row.digest


# ---- where and what ----------------------------------------------------------------------------------


def test_the_root_is_chosen_by_environment_and_platform(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AZQUANT_MODELS", str(tmp_path / "mine"))
    assert default_root() == tmp_path / "mine" == Store().root
    monkeypatch.delenv("AZQUANT_MODELS")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert default_root() == tmp_path / "data" / "azquant" / "models"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert default_root() == Path.home() / ".local" / "share" / "azquant" / "models"
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    assert ollama_root() == tmp_path / "ollama" == Store("ollama").root


def test_a_file_or_a_name_is_resolved(store: Store, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.create("m:v1", gguf)
    assert resolve("m:v1", store.root) == store.path("m:v1")
    assert resolve(str(gguf), store.root) == gguf and resolve(gguf) == gguf
    monkeypatch.chdir(gguf.parent)
    (gguf.parent / "m:v1").write_bytes(b"a file of that name comes first")
    assert resolve("m:v1", store.root) == Path("m:v1")
    assert resolve("missing.gguf", store.root) == Path("missing.gguf")
    with pytest.raises(
        InputFileError, match=r"nope:v1 does not exist: neither a file nor a model in the store"
    ):
        resolve("nope:v1", store.root)


def test_store_is_a_mapping_of_names(store: Store, gguf: Path) -> None:
    assert list(store) == [] and store.list() == [] and store.check() == []
    store.create("m:v1", gguf)
    assert list(store) == [ModelName.parse("m:v1")] and "m:v1" in store and "m" not in store
    assert isinstance(parse_manifest(next(store.root.rglob("v1")).read_bytes(), "x"), Manifest)
    assert aq.store.Store is Store
