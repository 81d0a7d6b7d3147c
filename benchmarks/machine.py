"""The machine header of every report."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import azquant
from azquant import cpu


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _flags() -> list[str]:
    wanted = (
        "avx2",
        "avx_vnni",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
        "amx_int8",
        "amx_bf16",
    )
    try:
        found = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
    except (OSError, IndexError):
        return []
    return [flag for flag in wanted if flag in found]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def header() -> dict[str, Any]:
    """What a figure depends on: processor, compiler, versions, threads."""
    compiler = os.environ.get("CC", "cc")
    try:
        shown = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        shown = "unknown"
    packages = ("numpy", "torch", "torchao", "transformers", "onnxruntime", "openvino", "gguf", "xllamacpp")
    return {
        "cpu": _cpu_model(),
        "flags": _flags(),
        "processors": cpu.default_threads(),
        "compiler": shown.splitlines()[0],
        "python": platform.python_version(),
        "kernel": platform.release(),
        "azquant": azquant.__version__,
        "isa": azquant.active_isa(),
        "versions": {name: version for name in packages if (version := _version(name))},
    }


def line(head: dict[str, Any]) -> str:
    """A header as pages show it."""
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    return (
        f"{head['cpu']} ({', '.join(head['flags'])}), {head['processors']} processors, "
        f"Linux {head['kernel']}, {head['compiler']}, Python {head['python']}, "
        f"azquant {head['azquant']}, {versions}"
    )


def slug() -> str:
    """The processor as part of a file name; virtual machines give several the same model name."""
    name = f"{_cpu_model()} {azquant.isas()[-1]}".lower()
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")
