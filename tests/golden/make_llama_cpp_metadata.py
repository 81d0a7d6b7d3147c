"""Makes llama_cpp_metadata.json: the keys that llama.cpp's converter writes for ``tests/metadata_cases.py``.

    AZQUANT_LLAMA_CPP=<a checkout of llama.cpp> python tests/golden/make_llama_cpp_metadata.py

The converter runs as it is, but that it is told the name of the pre-tokenizer: it knows those of published
models alone, by a hash. Each value stands with its type; of the architecture's own keys see
llama_cpp_names.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from metadata_cases import CASES  # noqa: E402

from azquant.gguf import open_gguf  # noqa: E402
from azquant.gguf.values import GGUFArray  # noqa: E402

RUN = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
sys.path.insert(1, sys.argv[1] + "/gguf-py")
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer, pre=sys.argv[4]: pre
sys.argv = ["convert_hf_to_gguf.py", sys.argv[2], "--outtype=f16", "--outfile=" + sys.argv[3]]
runpy.run_path(sys.path[0] + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def described(path: Path) -> dict[str, list[object]]:
    """Each general and tokenizer key: its type, and its value."""
    with open_gguf(path) as file:
        found: dict[str, list[object]] = {}
        for key, kind in file.metadata_types.items():
            value = file.metadata[key]
            if isinstance(value, GGUFArray):
                found[key] = [f"array of {value.element_type.name}", value.tolist()]
            else:
                found[key] = [kind.name, value]
        return {
            key: value for key, value in found.items() if key.startswith(("general.", "tokenizer.", "GGUF"))
        }


def main() -> None:
    result: dict[str, dict[str, list[object]]] = {}
    for name, (write, pre) in CASES.items():
        with tempfile.TemporaryDirectory() as root:
            folder, out = write(Path(root)), Path(root) / "out.gguf"
            command = [sys.executable, "-c", RUN, os.environ["AZQUANT_LLAMA_CPP"], str(folder), str(out), pre]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr}")
            result[name] = described(out)
    tables = (f" {json.dumps(name)}: {{\n{_lines(keys)}\n }}" for name, keys in result.items())
    text = "{\n" + ",\n".join(tables) + "\n}\n"
    (HERE / "llama_cpp_metadata.json").write_text(text, encoding="utf-8")


def _lines(table: dict[str, list[object]]) -> str:
    return ",\n".join(
        f"  {json.dumps(key)}: {json.dumps(table[key], ensure_ascii=False)}" for key in sorted(table)
    )


if __name__ == "__main__":
    main()
