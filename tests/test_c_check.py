"""Builds and runs tests/c: every slot of every kernel table, and the C API, without Python in between."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent / "c"


def compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "cc"))


@pytest.mark.skipif(compiler() is None, reason="there is no C compiler")
@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_the_c_check_passes(tmp_path: Path) -> None:
    command = ["make", "-C", str(FOLDER), "-j2", "check", f"BUILD={tmp_path}", f"CC={compiler()}"]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    counts = re.search(r"^(\d+) passed, 0 failed$", done.stdout, re.MULTILINE)
    assert counts is not None
    assert int(counts[1]) > 20_000
