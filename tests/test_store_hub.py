"""pull and push, against a small Hub on loopback that breaks off, lies, refuses and redirects."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import COMMIT, Hub, serving
from store_support import files, tiny_gguf, write_gguf_file

from azquant.errors import (
    ArgumentError,
    AzquantError,
    AzquantWarning,
    GGUFError,
    HubError,
    MissingDependencyError,
    OutputError,
)
from azquant.store import Store
from azquant.store.hub import HubPlace
from azquant.store.layout import PARTIAL

huggingface_hub = pytest.importorskip("huggingface_hub")

# huggingface_hub's own way with its HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

PIECE = 1 << 16
MODEL = tiny_gguf(2.0, rows=20_000)  # 640 kB: many pieces


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No login, cache or waiting of the machine's own."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "stored_tokens"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", PIECE)  # else 10 MB: larger than the whole file
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub({"tiny-q4_0.gguf": MODEL, "README.md": b"hello"})) as hub:
        yield hub


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def log_in(monkeypatch: pytest.MonkeyPatch, token: str = "hf_right") -> None:
    monkeypatch.setenv("HF_TOKEN", token)


def partials(store: Store) -> list[Path]:
    return list((store.root / "blobs").glob(f"{PARTIAL}*"))


# ---- pull --------------------------------------------------------------------------------------------


def test_pull_gives_the_model_the_name_ollama_would(hub: Hub, store: Store) -> None:
    seen: list[tuple[int, int]] = []
    row = store.pull(
        "hf:org/repo:q4_0", endpoint=hub.url, progress=lambda done, total: seen.append((done, total))
    )
    assert str(row.name) == "hf.co/org/repo:q4_0"
    assert store.path("hf.co/org/repo:q4_0").read_bytes() == MODEL
    assert store.show(str(row.name)).config["source"] == f"hf:org/repo:tiny-q4_0.gguf@{COMMIT}"
    assert seen[-1] == (len(MODEL), len(MODEL)) and len(seen) > 1
    assert store.check() == []


def test_a_file_a_revision_and_a_name_can_be_chosen(hub: Hub, store: Store) -> None:
    hub.files["sub/other-q8_0.gguf"] = tiny_gguf(3.0)
    assert (
        str(store.pull("hf:org/repo:sub/other-q8_0.gguf@v1.0", "mine:1", endpoint=hub.url).name) == "mine:1"
    )
    assert store.path("mine:1").read_bytes() == tiny_gguf(3.0)
    row = store.pull("hf:org/repo:Q8_0@v1.0", endpoint=hub.url)
    assert str(row.name) == "hf.co/org/repo:Q8_0-v1.0"
    assert str(store.pull("hf:org/repo:tiny-q4_0.gguf", endpoint=hub.url).name) == "hf.co/org/repo:tiny-q4_0"
    with pytest.raises(HubError, match=r"could be any of tiny-q4_0.gguf, sub/other-q8_0.gguf; name the file"):
        store.pull("hf:org/repo", endpoint=hub.url)
    with pytest.raises(HubError, match=r"no such file; it has tiny-q4_0.gguf, sub/other-q8_0.gguf"):
        store.pull("hf:org/repo:q5_1", endpoint=hub.url)


def test_template_system_and_parameters_come_along(hub: Hub, store: Store) -> None:
    hub.files |= {
        "template": b"{{ .Prompt }}",
        "system": b"Hi.",
        "params": b'{"stop": ["x"], "evil": 1, "seed": 7}',
    }
    with pytest.warns(AzquantWarning, match=r"unknown \['evil'\]; left out"):
        store.pull("hf:org/repo", "m", endpoint=hub.url)
    info = store.show("m")
    assert (info.template, info.system, info.parameters) == (
        "{{ .Prompt }}",
        "Hi.",
        {"seed": 7, "stop": ["x"]},
    )


def test_a_name_that_is_taken_is_refused_before_anything_is_downloaded(hub: Hub, store: Store) -> None:
    store.pull("hf:org/repo", "m", endpoint=hub.url)
    hub.requests.clear()
    with pytest.raises(OutputError, match="already exists"):
        store.pull("hf:org/repo", "m", endpoint=hub.url)
    assert hub.requests == []
    store.pull("hf:org/repo", "m", endpoint=hub.url, overwrite=True)
    assert store.check() == []


def test_an_interrupted_pull_goes_on_where_it_stopped(hub: Hub, store: Store) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.pull("hf:org/repo", "m", endpoint=hub.url, progress=stop)
    (partial,) = partials(store)
    have = partial.stat().st_size
    assert 0 < have < len(MODEL) and store.list() == []
    assert [problem.kind for problem in store.check()] == ["partial"]
    hub.requests.clear()
    store.pull("hf:org/repo", "m", endpoint=hub.url)
    assert [headers["range"] for headers in hub.seen("GET", "tiny-q4_0.gguf")] == [f"bytes={have}-"]
    assert store.path("m").read_bytes() == MODEL and partials(store) == []


def test_a_connection_that_breaks_off_is_taken_up_again(hub: Hub, store: Store) -> None:
    hub.break_after = 300_000
    store.pull("hf:org/repo", "m", endpoint=hub.url)
    assert store.path("m").read_bytes() == MODEL
    assert len(hub.seen("GET", "tiny-q4_0.gguf")) == 3


def test_a_pull_that_is_killed_goes_on_in_another_process(hub: Hub, store: Store, tmp_path: Path) -> None:
    code = """
import os, signal, sys
from azquant.store import Store
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = int(sys.argv[3])
def stop(done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
Store(sys.argv[1]).pull("hf:org/repo", "m", endpoint=sys.argv[2], progress=stop)
"""
    done = subprocess.run([sys.executable, "-c", code, str(store.root), hub.url, str(PIECE)], timeout=60)
    assert done.returncode == -9
    hub.requests.clear()
    store.pull("hf:org/repo", "m", endpoint=hub.url)
    assert "range" in hub.seen("GET", "tiny-q4_0.gguf")[0]
    assert store.path("m").read_bytes() == MODEL and store.check() == []


def test_bytes_that_are_not_those_stated_are_not_kept(hub: Hub, store: Store) -> None:
    hub.altered = True
    with pytest.raises(HubError, match="the bytes that came are not those the Hub states"):
        store.pull("hf:org/repo", "m", endpoint=hub.url)
    assert files(store.root) == {}
    hub.altered = False
    store.pull("hf:org/repo", "m", endpoint=hub.url)
    assert store.path("m").read_bytes() == MODEL


def test_what_is_no_gguf_file_is_not_kept(hub: Hub, store: Store) -> None:
    hub.files = {"x.gguf": b"<html>not a model</html>"}
    with pytest.raises(GGUFError):
        store.pull("hf:org/repo", "m", endpoint=hub.url)
    assert files(store.root) == {}


@pytest.mark.parametrize(
    ("change", "source", "message"),
    [
        ({}, "hf:org/repo@v9", r"hf:org/repo has no revision 'v9'"),
        ({}, "hf:org/nothing", "is not on the Hub, or is private"),
        ({"gated": 401}, "hf:org/repo", "is gated: accept its terms on the Hub and log in"),
        ({"gated": 403}, "hf:org/repo", "is gated: accept its terms on the Hub and log in"),
        ({"private": True}, "hf:org/repo", "is not on the Hub, or is private and you are not logged in"),
        ({"files": {}}, "hf:org/repo", "it has no GGUF file"),
        (
            {"files": {"a-00001-of-00002.gguf": b"", "a-00002-of-00002.gguf": b""}},
            "hf:org/repo",
            "is split over 2",
        ),
        ({"files": {"a.gguf": MODEL, "params": b"x" * 2_000_000}}, "hf:org/repo", "too many for what it is"),
        (
            {"files": {"a.gguf": MODEL, "params": b"[]"}},
            "hf:org/repo",
            "params of hf:org/repo is no JSON object",
        ),
    ],
)
def test_what_the_hub_refuses_is_explained(
    hub: Hub, store: Store, change: dict[str, object], source: str, message: str
) -> None:
    for name, value in change.items():
        setattr(hub, name, value)
    with pytest.raises(HubError, match=message):
        store.pull(source, "m", endpoint=hub.url)
    assert store.list() == []


def test_nobody_at_the_other_end(store: Store) -> None:
    with pytest.raises(HubError, match="cannot be reached"):
        store.pull("hf:org/repo", "m", endpoint="http://127.0.0.1:9")


def test_the_token_goes_to_the_hub_and_not_to_the_host_it_redirects_to(
    hub: Hub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch)
    hub.private = True
    with serving(Hub(dict(hub.files), is_cdn=True)) as cdn:
        hub.cdn = cdn.url
        store.pull("hf:org/repo", "m", endpoint=hub.url)
        assert store.path("m").read_bytes() == MODEL
        assert len(cdn.seen("GET", "tiny-q4_0.gguf")) == 1
        assert not any("authorization" in headers for _, _, headers in cdn.requests)
    assert all(headers["authorization"] == "Bearer hf_right" for _, _, headers in hub.requests)


def test_a_redirect_that_is_not_http_is_refused(hub: Hub, store: Store) -> None:
    hub.cdn = "ftp://127.0.0.1"
    with pytest.raises(HubError, match="redirected to ftp://, which is not safe"):
        store.pull("hf:org/repo", "m", endpoint=hub.url)


def test_the_librarys_cache_serves_offline_and_saves_a_download(
    hub: Hub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    huggingface_hub.hf_hub_download("org/repo", "tiny-q4_0.gguf", endpoint=hub.url)
    hub.requests.clear()
    store.pull("hf:org/repo", "online", endpoint=hub.url)
    assert hub.seen("GET", "resolve") == []
    with pytest.warns(AzquantWarning, match="using its local cache"):
        store.pull("hf:org/repo:q4_0", "offline", endpoint="http://127.0.0.1:9")
    assert store.path("offline") == store.path("online")


def test_two_pulls_of_one_file_do_not_write_over_each_other(hub: Hub, store: Store) -> None:
    other = Store(store.root)
    errors: list[str] = []

    def second(done: int, total: int) -> None:
        if not errors:
            with pytest.raises(OutputError, match="another process is downloading the same file") as caught:
                other.pull("hf:org/repo", "n", endpoint=hub.url)
            errors.append(str(caught.value))
            assert [problem.kind for problem in other.check()] == [], "it is in use: no debris"

    store.pull("hf:org/repo", "m", endpoint=hub.url, progress=second)
    assert errors and store.path("m").read_bytes() == MODEL


# ---- push --------------------------------------------------------------------------------------------


def test_what_is_pushed_can_be_pulled_again(
    hub: Hub, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch)
    hub.private, hub.files = True, {}
    write_gguf_file(tmp_path / "x.gguf", 4.0)
    (tmp_path / "Modelfile").write_text(
        "FROM ./x.gguf\nTEMPLATE {{ .Prompt }}\nSYSTEM Hi.\nPARAMETER stop <x>\n"
    )
    store.create("az-llm:v1.0", tmp_path / "Modelfile", modelfile=True)
    url = store.push("az-llm:v1.0", "hf:org/repo", endpoint=hub.url, create=True)
    assert url == f"{hub.url}/org/repo/commit/{COMMIT}"
    assert set(hub.files) == {"az-llm-v1.0.gguf", "template", "system", "params"}
    assert hub.files["az-llm-v1.0.gguf"] == tiny_gguf(4.0) and len(hub.commits) == 1
    store.pull("hf:org/repo", "again", endpoint=hub.url)
    one, other = store.show("az-llm:v1.0"), store.show("again")
    assert [layer.digest for layer in one.layers] == [layer.digest for layer in other.layers]


@pytest.mark.parametrize(
    ("token", "message"), [("", "may not be used|is private"), ("hf_wrong", "is private")]
)
def test_push_without_the_right_login_is_explained(
    hub: Hub, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, message: str
) -> None:
    if token:
        log_in(monkeypatch, token)
    hub.private = True
    store.create("m", write_gguf_file(tmp_path / "x.gguf"))
    with pytest.raises(HubError, match=message):
        store.push("m", "hf:org/repo", endpoint=hub.url)


# ---- places ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("hf:a/b", HubPlace("a/b", None, None)),
        ("hf:a/b:q4_0", HubPlace("a/b", "q4_0", None)),
        ("hf:a/b:sub/x.gguf@v1.0", HubPlace("a/b", "sub/x.gguf", "v1.0")),
        ("hf:hf.co/a/b@main", HubPlace("a/b", None, "main")),
    ],
)
def test_places_are_read(text: str, place: HubPlace) -> None:
    assert HubPlace.parse(text) == place


@pytest.mark.parametrize(
    "text", ["", "a/b", "hf:", "hf:a", "hf:a/b/c", "hf:../b", "hf:a/b:../x", "hf:a/b\0", "ms:a/b"]
)
def test_what_is_no_place_is_refused(text: str, store: Store) -> None:
    with pytest.raises(ArgumentError, match="is no place on the Hub"):
        store.pull(text)


def test_a_strange_endpoint_is_refused(store: Store) -> None:
    with pytest.raises(ArgumentError, match="is no http"):
        store.pull("hf:a/b", endpoint="file:///etc")


def test_without_the_library_it_says_what_to_install(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'azquant\[hub\]'"):
        store.pull("hf:a/b")
    assert issubclass(HubError, AzquantError)
