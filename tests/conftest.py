"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import azquant
from azquant import _backend, cpu
from azquant.errors import BackendWarning

ROOT = Path(__file__).resolve().parent.parent

# A shell's background job ignores Ctrl-C, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real files beside a developer's checkout; tests that need it skip without it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not here")
    return folder


# ---- instruction sets --------------------------------------------------------------------------------


def _c_isas() -> list[tuple[str, bool]]:
    """Every ISA compiled in, and whether this machine runs it; empty without the extension."""
    try:
        from azquant import _native
    except ImportError:
        return []
    return _native.isas()


def _params() -> list[object]:
    found = _c_isas()
    if not found:
        return [pytest.param("scalar", marks=pytest.mark.skip(reason="the C extension is not built"))]
    skip = {
        name: pytest.mark.skip(reason=f"this machine cannot run {name}")
        for name, usable in found
        if not usable
    }
    return [pytest.param(name, marks=skip.get(name, ())) for name, _ in found]


@contextmanager
def _running_on(name: str) -> Iterator[None]:
    """Makes azquant compute with one ISA, or with NumPy, and puts back what was there before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AZQUANT_BACKEND", "numpy" if name == "numpy" else "c")
        patch.delenv("AZQUANT_ISA", raising=False)
        _forget_backend()
        try:
            if name == "numpy":
                with pytest.warns(BackendWarning):
                    _backend.kernels()
                yield
            else:
                before, threads = azquant.active_isa(), azquant.num_threads()
                azquant.use_isa(name)
                yield
                azquant.use_isa(before)
                azquant.set_num_threads(threads)
        finally:
            _forget_backend()


def _forget_backend() -> None:
    """The next call chooses the backend and reads the environment anew."""
    _backend.kernels.cache_clear()
    cpu._prepare.cache_clear()


@pytest.fixture
def needs_c() -> None:
    """Skips where the package was installed without a C compiler."""
    if not _c_isas():
        pytest.skip("the C extension is not built")


@pytest.fixture(params=_params())
def c_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each ISA of the C kernels in turn; those that this machine lacks are skipped."""
    with _running_on(request.param):
        yield request.param


@pytest.fixture(params=[*_params(), "numpy"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each ISA of the C kernels in turn, then the NumPy backend (``"numpy"``)."""
    with _running_on(request.param):
        yield request.param


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a piece of Python in a fresh interpreter: ``run_python(code, AZQUANT_ISA="scalar", check=True)``.

    Variables of azquant that this process inherited are not handed on; keyword arguments set new ones.
    """

    def run(code: str, *, check: bool = True, command: tuple[str, ...] = (), **variables: str) -> object:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("AZQUANT_")} | variables
        done = subprocess.run(
            [*command, sys.executable, "-W", "error", "-c", code],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert not check or done.returncode == 0, f"exit code {done.returncode}:\n{done.stderr}"
        return done

    return run  # type: ignore[return-value]
