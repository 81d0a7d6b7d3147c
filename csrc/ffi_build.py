"""Build script of the extension ``azquant._azquant``, run by setuptools. Must not import azquant.

The two public headers are the only description of the interface: their plain declarations become cffi's
cdef, after the lines that only a C compiler needs (guards, includes) are dropped.
"""

import os
import sysconfig
from pathlib import Path

from cffi import FFI

HERE = Path("csrc")  # setuptools runs in the project root; sources must be relative for the sdist
HEADERS = ("azq_blocks.h", "azq.h")
DROPPED = ("#ifndef", "#endif", "#include", "#define AZQ_BLOCKS_H", "#define AZQ_H")


def declarations(name: str) -> str:
    """The header's text without guard and include lines."""
    text = (HERE / name).read_text(encoding="utf-8")
    return "\n".join(line for line in text.splitlines() if not line.startswith(DROPPED))


ffi = FFI()
for header in HEADERS:
    ffi.cdef(declarations(header))

if os.name == "nt":
    flags = ["/O2", "/std:c11"]
else:
    flags = [
        "-O3",
        "-std=c11",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-Wall",
        "-Wextra",
    ]
    flags += ["-Wno-psabi"]  # vectors passed between static inline functions only

ffi.set_source(
    "azquant._azquant",
    '#include "azq.h"',
    sources=sorted(str(path) for path in HERE.glob("**/*.c")),
    depends=sorted(str(path) for path in HERE.glob("**/*.h")),
    include_dirs=[str(HERE)],
    extra_compile_args=flags + os.environ.get("AZQUANT_CFLAGS", "").split(),
    extra_link_args=[] if os.name == "nt" else ["-pthread", *os.environ.get("AZQUANT_LDFLAGS", "").split()],
    libraries=[] if os.name == "nt" else ["m"],
    optional=True,  # without a compiler the package still installs and runs through NumPy
    py_limited_api=not sysconfig.get_config_var("Py_GIL_DISABLED"),
)
