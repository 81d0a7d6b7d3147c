"""The source archive and the wheel, built from a copy of the tree without any network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

pytest.importorskip("setuptools", minversion="77", reason="building needs a current setuptools")

LEFT_OUT = shutil.ignore_patterns(
    ".*", "build", "dist", "demo", "*.egg-info", "__pycache__", "_azquant.*", "*.safetensors"
)
NO_OPTIMIZER = "-O0"  # the kernels' speed is not the question here, and this is ten times as quick to compile


def build(command: list[str], folder: Path, **environment: str) -> None:
    env = {**os.environ, "AZQUANT_CFLAGS": NO_OPTIMIZER, **environment}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def pip_wheel(source: Path, out: Path, **environment: str) -> Path:
    command = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    build([*command, "--wheel-dir", str(out), "."], source, **environment)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "tree", ignore=LEFT_OUT)
    build(["-c", "from setuptools.build_meta import build_sdist; build_sdist('..')"], folder / "tree")
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def unpacked(sdist: Path) -> Path:
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():  # ours, but a test is no place for surprises
            assert not Path(member.name).is_absolute()
            assert ".." not in Path(member.name).parts
        archive.extractall(sdist.parent)
    return sdist.parent / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(unpacked: Path) -> Path:
    """Built from the unpacked source archive: what it lacks, the wheel lacks too."""
    return pip_wheel(unpacked, unpacked.parent / "wheel")


def installed(wheel: Path, folder: Path, code: str, **environment: str) -> str:
    """What ``code`` prints with nothing but the wheel's azquant to import."""
    command = ["-m", "pip", "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)]
    build(command, wheel.parent)
    # -S and the dependencies by path: an editable install of this tree must not fill in what is missing.
    path = os.pathsep.join([str(folder), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    env = {**os.environ, "PYTHONPATH": path, **environment}
    program = (
        f"import azquant, pathlib; assert pathlib.Path(azquant.__file__).is_relative_to({str(folder)!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", program + code], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def python_files() -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / "azquant").rglob("*.py")}


def test_sdist_holds_everything_a_build_and_its_tests_need(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md", "Makefile"}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.[ch]")}
    wanted |= {"csrc/ffi_build.py", "tests/conftest.py", "tests/test_packaging.py"} | python_files()
    assert wanted - names == set()
    assert [name for name in names if name.endswith((".so", ".o", ".pyc"))] == []


def test_wheel_is_for_every_python_from_3_10(wheel: Path) -> None:
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        pytest.skip("a free-threaded Python has no stable ABI")
    assert "-cp310-abi3-" in wheel.name


def test_wheel_holds_the_package_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "azquant = azquant.cli:main" in entry_points
    package = {name for name in names if ".dist-info/" not in name}
    compiled = {name for name in package if name.endswith((".so", ".pyd"))}
    assert len(compiled) == 1
    assert package - compiled == python_files() | {"azquant/py.typed"}


def test_wheel_runs_with_the_c_kernels(wheel: Path, tmp_path: Path) -> None:
    code = "print(azquant.backend(), azquant.quantize([[1.0] * 32]).nbytes)"
    assert installed(wheel, tmp_path, code, AZQUANT_BACKEND="c") == "c 18\n"


def test_without_a_compiler_it_installs_and_runs_on_numpy(unpacked: Path, tmp_path: Path) -> None:
    shutil.copytree(unpacked, tmp_path / "tree", ignore=shutil.ignore_patterns("build", "_azquant.*"))
    wheel = pip_wheel(tmp_path / "tree", tmp_path / "wheel", CC="false")
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.endswith(".so")] == []
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        print(azquant.backend(), azquant.quantize([[1.0] * 32]).nbytes)
print(len(caught), caught[0].category.__name__, "install a C compiler" in str(caught[0].message))
"""
    assert installed(wheel, tmp_path / "site", code) == "numpy 18\nnumpy 18\n1 BackendWarning True\n"
