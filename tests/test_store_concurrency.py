"""Several processes at one store, and processes that are killed: no manifest without its blobs, ever."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from store_support import blobs, digest, put_model, tiny_gguf, write_gguf_file

from azquant.store import Store

# Each makes, copies, replaces and removes models that share their blobs with everybody else's.
WORKER = """
import random, sys, warnings
from pathlib import Path
from azquant.errors import AzquantError, ModelNotFoundError, OutputError
from azquant.store import Store
root, folder, seed, attempts = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
warnings.simplefilter("error")
rng, store, done = random.Random(seed), Store(root), 0
ggufs = sorted(folder.glob("*.gguf"))
print("begun", flush=True)
for _ in range(attempts):
    name = f"m{rng.randrange(3)}:{rng.randrange(3)}"
    try:
        match rng.randrange(5):
            case 0 | 1:
                store.create(name, rng.choice(ggufs), overwrite=rng.random() < 0.5)
            case 2:
                store.cp(name, f"m{rng.randrange(3)}:{rng.randrange(3)}", overwrite=rng.random() < 0.5)
            case 3:
                store.rm(name)
            case 4:
                store.list()
        done += 1
    except ModelNotFoundError:
        pass
    except OutputError as error:
        if "already exists" not in str(error):
            raise
print(done)
"""


def start(root: Path, folder: Path, seed: int, attempts: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(root), str(folder), str(seed), str(attempts)]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "begun\n"
    return worker


def ggufs(folder: Path) -> Path:
    folder.mkdir()
    for i in range(3):
        write_gguf_file(folder / f"{i}.gguf", float(i), rows=4096)
    return folder


def keep_one(root: Path) -> None:
    """A model that nobody touches, whose blob everybody's models share."""
    put_model(root, "kept", "1", [("model", tiny_gguf(0.0, rows=4096))])


def damaged(store: Store) -> list[str]:
    return [f"{problem.kind} {problem.path}" for problem in store.check() if not problem.is_debris]


def test_processes_at_once_lose_nothing_and_leave_nothing(tmp_path: Path) -> None:
    root, folder = tmp_path / "store", ggufs(tmp_path / "ggufs")
    keep_one(root)
    workers = [start(root, folder, seed, 150) for seed in range(3)]
    for worker in workers:
        out, err = worker.communicate(timeout=60)
        assert (worker.returncode, err) == (0, "")
        assert int(out) > 15, "most attempts find what they need"
    store = Store(root)
    assert store.check() == [], "not even debris: nobody was killed"
    assert digest(tiny_gguf(0.0, rows=4096)) in blobs(root)


def test_killed_at_any_moment_no_manifest_dangles_and_repair_cleans_up(tmp_path: Path) -> None:
    root, folder = tmp_path / "store", ggufs(tmp_path / "ggufs")
    keep_one(root)
    store, rng = Store(root), random.Random(12)
    for seed in range(6):
        workers = [start(root, folder, 2 * seed + i, 1_000_000) for i in range(2)]
        time.sleep(0.05 + 0.25 * rng.random())
        for worker in workers:
            worker.send_signal(signal.SIGKILL)
        for worker in workers:
            worker.communicate(timeout=30)
            assert worker.returncode == -signal.SIGKILL
        assert damaged(store) == []
        assert "kept:1" in store and store.path("kept:1").read_bytes() == tiny_gguf(0.0, rows=4096)
    store.check(repair=True)
    assert store.check() == []
    for name in list(store):
        store.rm(str(name))
    assert blobs(root) == set()


def test_killed_between_blobs_and_manifest_leaves_debris_that_repair_removes(tmp_path: Path) -> None:
    root = tmp_path / "store"
    keep_one(root)
    gguf = write_gguf_file(tmp_path / "x.gguf", 9.0)
    code = """
import os, signal, sys
from azquant.store import Store
from azquant.store.layout import Layout
Layout.write_manifest = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
Store(sys.argv[1]).create("new:1", sys.argv[2])
"""
    done = subprocess.run([sys.executable, "-c", code, str(root), str(gguf)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    store = Store(root)
    assert "new:1" not in store
    assert {problem.kind for problem in store.check()} == {"unused"}
    repaired = store.check(repair=True)
    assert len(repaired) == 2 and all(problem.repaired for problem in repaired), "the model and its config"
    assert store.check() == [] and digest(gguf.read_bytes()) not in blobs(root)


def test_whoever_adds_holds_back_whoever_deletes(tmp_path: Path) -> None:
    """A blob that is there, but not yet referred to, outlives another process's rm and repair."""
    root = tmp_path / "store"
    keep_one(root)
    store = Store(root)
    code = """
import sys
from azquant.store import Store
store = Store(sys.argv[1])
print("begun", flush=True)
print(len(store.check(repair=True)))
"""
    command = [sys.executable, "-c", code, str(root)]
    with store._layout.adding():
        layer = store._layout.add_bytes(b"not yet referred to", "x")
        other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        assert other.stdout.readline() == "begun\n"
        time.sleep(0.3)
        assert other.poll() is None
        assert layer.digest in blobs(root)
    assert other.communicate(timeout=30)[0] == "1\n"
    assert layer.digest not in blobs(root)
