"""The house rules: who may import whom, what an import costs, and NumPy as a full backend."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT

import azquant as aq

PACKAGE = ROOT / "azquant"
CSRC = ROOT / "csrc"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

Run = Callable[..., "subprocess.CompletedProcess[str]"]

BLOCKS = {"_backend", "_pages", "cpu", "errors", "tensor", "types"}
"""What stands below ops."""

MAY_IMPORT: dict[str, set[str]] = {
    "__init__": {"_version", "cpu", "errors", "ops", "tensor"},
    "__main__": {"cli"},
    "_backend": {"_fallback", "_native", "errors"},
    "_charsmap": {"errors"},
    "_codebooks": set(),
    "_fallback": {"_fallback_blocks", "_fallback_program", "errors"},
    "_fallback_blocks": {"_fallback_decode", "_fallback_encode", "errors", "types"},
    "_fallback_decode": {"_codebooks"},
    "_fallback_encode": {"_fallback_decode", "_fallback_search"},
    "_fallback_program": {
        "_fallback_blocks", "_fallback_decode", "_fallback_encode", "errors", "program", "types",
    },
    "_fallback_search": {"_fallback_decode"},
    "_hashing": {"errors"},
    "_native": {"_lazy", "_azquant", "errors", "program"},
    "_lazy": set(),
    "_pages": {"_lazy"},
    "_tokenizer_backend": {"_backend", "_charsmap", "errors", "gguf", "pretokenizer"},
    "_version": set(),
    "architectures": {"_lazy", "errors", "gguf", "program", "tensor"},
    "checkpoint": {"errors"},
    "conversion": {
        "_hashing", "_tokenizer_backend", "_version", "architectures", "checkpoint", "cpu", "errors", "gguf",
        "imatrix", "ops", "pretokenizer", "tensor", "tokenizer", "types"
    },
    "cpu": {"_backend", "errors", "types"},
    "engine": {"_backend", "_lazy", "architectures", "cpu", "errors", "gguf", "program", "tokenizer"},
    "errors": set(),
    "gguf": {"_lazy", "_backend", "_pages", "errors", "types"},
    "imatrix": {"errors", "gguf", "types"},
    "limits": {"_backend", "cpu"},
    "ops": BLOCKS,
    "pretokenizer": {"errors"},
    "program": {"_lazy", "errors"},
    "tensor": BLOCKS - {"tensor"},
    "tokenizer": {"_tokenizer_backend", "errors", "gguf", "pretokenizer"},
    "types": {"errors"},
}  # fmt: skip
"""DESIGN §2, by module or subpackage. cli and evaluate stand on top and may import everything."""

ON_TOP = {"cli", "evaluate", "store", "torch"}


def unit_of(path: Path) -> str:
    """The module, or the subpackage, that a file belongs to."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def is_unit(name: str) -> bool:
    return name == "_azquant" or (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def imports(path: Path) -> Iterator[str]:
    """Full names that a file imports anywhere, but for `if TYPE_CHECKING:`."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))


def imported_units(path: Path) -> set[str]:
    """Modules and subpackages of azquant that a file imports; "__init__": a name of azquant itself."""
    found = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "azquant":
            found.add(parts[1] if len(parts) > 1 and is_unit(parts[1]) else "__init__")
    return found


# ---- Python ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_points_back(path: Path) -> None:
    unit = unit_of(path)
    if unit in ON_TOP:
        return
    assert unit in MAY_IMPORT, f"azquant/{unit} has no row in MAY_IMPORT: say whom it may import"
    extra = imported_units(path) - MAY_IMPORT[unit] - {unit}
    assert not extra, f"{path.relative_to(ROOT)} may not import {sorted(extra)}"


def test_the_rules_have_no_rows_of_modules_that_are_gone() -> None:
    assert {name for name in MAY_IMPORT if not is_unit(name)} == set()


def test_heavy_packages_are_imported_in_one_place_only() -> None:
    allowed = {
        "torch": {"evaluate", "torch"},  # evaluate: what transformers computes with, in a proof
        "cffi": set(),
        "tokenizers": {"_tokenizer_backend"},
        "transformers": {"evaluate"},  # where it is installed, it is the judge of a proof
        "click": {"cli"},
        "rich": {"cli"},
        "gguf": set(),
        "xllamacpp": set(),
    }
    for path in MODULES:
        for name in imports(path):
            package = name.split(".")[0]
            assert unit_of(path) in allowed.get(package, {unit_of(path)}), f"{path} imports {name}"


def test_importing_azquant_is_light(run_python: Run) -> None:
    done = run_python("import sys, azquant; print(*sorted({name.split('.')[0] for name in sys.modules}))")
    heavy = {"torch", "tokenizers", "transformers", "safetensors", "click", "rich", "jinja2", "sentencepiece"}
    assert not heavy & set(done.stdout.split())
    done = run_python(
        "import sys, azquant; print(*(name for name in sys.modules if name.startswith('azquant.')))"
    )
    lazy = {"azquant.conversion", "azquant.engine", "azquant.gguf", "azquant.checkpoint", "azquant.tokenizer"}
    assert not lazy & set(done.stdout.split())


def test_every_module_imports_without_torch(run_python: Run) -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in MODULES
    ]
    names = [name for name in names if unit_of_name(name) not in {"torch", "__main__"}]
    run_python(
        "import importlib, sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        f"for name in {names}: importlib.import_module(name)"
    )


def unit_of_name(name: str) -> str:
    return name.split(".")[1] if "." in name else name


def _rank(name: str) -> tuple[int, list[tuple[str, int]]]:
    """Constants, then classes, then the rest, numbers by value: the order that ruff keeps."""
    pieces = [(text, int(number or -1)) for text, number in re.findall(r"(\D+)(\d*)", name)]
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, pieces)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_export_lists_are_sorted_and_true(path: Path) -> None:
    if path.name in ("__main__.py", "_version.py") or unit_of(path) == "torch":
        return
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if name == "azquant._native":
        pytest.importorskip("azquant._azquant", reason="the C extension is not built")
    module = importlib.import_module(name)
    exported = module.__all__
    assert exported == sorted(exported, key=_rank)
    assert len(set(exported)) == len(exported)
    assert all(hasattr(module, export) for export in exported)


def test_what_azquant_exports() -> None:
    assert set(aq.__all__) >= {
        "AzquantError",
        "AzquantWarning",
        "QTensor",
        "__version__",
        "active_isa",
        "backend",
        "convert",
        "dequantize",
        "isas",
        "load",
        "matmul",
        "num_threads",
        "open_gguf",
        "quantize",
        "set_num_threads",
        "use_isa",
    }
    assert all(callable(getattr(aq, name)) for name in aq.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        aq.quantise  # noqa: B018


# ---- C -----------------------------------------------------------------------------------------------


def included(path: Path) -> set[str]:
    found = re.findall(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"), re.MULTILINE)
    return {Path(name).name for name in found}


KERNELS = sorted(CSRC.glob("kernels/*.[ch]"))


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_know_nothing_of_the_house_above_them(path: Path) -> None:
    own = {"azq_blocks.h", "azq_codebooks.h", "azq_half.h", "azq_kernels.h", "azq_target.h"}
    own |= {"cpu.h", "packed_types.h"} | {kernel.name for kernel in KERNELS if kernel.suffix == ".h"}
    ours = {name for name in included(path) if (CSRC / name).exists() or (CSRC / "kernels" / name).exists()}
    assert ours <= own
    words = set(
        re.findall(r"\w+", re.sub(r"/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.DOTALL))
    )
    assert not words & {
        "azq_status",
        "azq_parallel",
        "azq_active",
        "malloc",
        "calloc",
        "free",
        "printf",
        "abort",
    }


def test_intrinsics_stay_in_the_kernels() -> None:
    for path in CSRC.glob("*.[ch]"):
        assert not included(path) & {"immintrin.h", "x86intrin.h", "arm_neon.h"}, path


def test_the_library_never_prints_or_exits() -> None:
    for path in [*CSRC.glob("*.c"), *KERNELS]:
        calls = re.findall(
            r"\b(printf|fprintf|puts|abort|exit|perror)\s*\(", path.read_text(encoding="utf-8")
        )
        assert not calls, f"{path.name}: {calls}"


# ---- the NumPy backend -------------------------------------------------------------------------------

FULL_CITIZEN = """
import warnings
import numpy as np
import azquant as aq
from azquant.errors import ArgumentError, BackendWarning

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert aq.backend() == "numpy"
    w = aq.quantize(np.ones((3, 64), np.float32))
    w.pack()
    assert np.array_equal(w.unpack(), w.data)
    assert np.allclose(aq.matmul(np.ones((2, 64), np.float32), w), 64)
    assert np.array_equal(aq.dequantize(w), np.ones((3, 64)))
    assert aq.isas() == [] and aq.active_isa() == "numpy"
    aq.set_num_threads(2)
    assert aq.num_threads() >= 1
    try:
        aq.use_isa("scalar")
        raise SystemExit("use_isa must refuse")
    except ArgumentError as error:
        assert "NumPy backend" in str(error)
warned = [str(w.message) for w in caught if w.category is BackendWarning]
assert len(warned) == 1 and len(caught) == 1, caught
assert caught[0].filename == "<string>", caught[0]  # the code that asked for kernels, not azquant's
print(warned[0])
"""


def test_numpy_does_everything_and_says_so_once(run_python: Run) -> None:
    assert "AZQUANT_BACKEND=numpy" in run_python(FULL_CITIZEN, AZQUANT_BACKEND="numpy").stdout


def test_without_the_extension_numpy_takes_over(run_python: Run) -> None:
    blocked = "import sys; sys.modules['azquant._azquant'] = None\n"
    # The tests run from the source tree, which is what a user may do by mistake after `pip install .`.
    assert "source tree" in run_python(blocked + FULL_CITIZEN).stdout
    demanded = run_python(blocked + "import azquant; azquant.backend()", AZQUANT_BACKEND="c", check=False)
    assert "ImportError" in demanded.stderr


STALE = """
import importlib, sys, types
real = importlib.import_module("azquant._azquant")
class Older:
    def __getattr__(self, name):
        if name == "AZQ_COMPUTE_AUTO":
            raise AttributeError("cffi library has no AZQ_COMPUTE_AUTO")
        return getattr(real.lib, name)
older = types.ModuleType("azquant._azquant")
older.ffi, older.lib = real.ffi, Older()
sys.modules["azquant._azquant"] = older
"""


def test_kernels_of_older_sources_are_not_used(needs_c: None, run_python: Run) -> None:
    """An editable install after `git pull`."""
    assert "build them anew" in run_python(STALE + FULL_CITIZEN).stdout


def test_an_unknown_backend_is_refused(run_python: Run) -> None:
    failed = run_python("import azquant; azquant.backend()", AZQUANT_BACKEND="cuda", check=False)
    assert "ArgumentError: AZQUANT_BACKEND='cuda': must be 'c' or 'numpy'" in failed.stderr


def test_both_backends_offer_the_same_entry_points() -> None:
    native = pytest.importorskip("azquant._native", reason="the C extension is not built")
    from azquant import _fallback

    assert native.__all__ == _fallback.__all__
    for name in native.__all__:
        if isinstance(getattr(native, name), type):
            public = [
                {n for n in vars(getattr(m, name)) if not n.startswith("_")} for m in (native, _fallback)
            ]
            assert public[0] - public[1] <= {"handle"}, name


@pytest.mark.parametrize("backend", ["c", "numpy"])
def test_a_model_speaks_on_both_backends(shared_data: Path, run_python: Run, backend: str) -> None:
    if backend == "c":
        pytest.importorskip("azquant._native", reason="the C extension is not built")
    (model,) = (shared_data / "stories260K").glob("*.gguf")
    golden = (shared_data / "stories260K" / "expected_stdout_llama2c.txt").read_text(encoding="utf-8")
    done = run_python(
        "import warnings, azquant\n"
        "warnings.simplefilter('ignore', azquant.errors.BackendWarning)\n"
        f"model = azquant.load({str(model)!r}, compute='fp32')\n"
        "print(model.generate('Once upon a time', max_tokens=60, temperature=0), end='')",
        AZQUANT_BACKEND=backend,
        PYTHONUTF8="1",
    )
    text = done.stdout
    assert len(text) > 100
    assert golden.startswith((text, "Once upon a time" + text))
