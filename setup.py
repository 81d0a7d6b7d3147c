"""Builds the C extension through cffi; everything else stands in pyproject.toml."""

import sysconfig

from setuptools import setup

# A free-threaded interpreter has no stable ABI: its wheels are tagged for one version.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

setup(
    cffi_modules=["csrc/ffi_build.py:ffi"],
    options={} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
