# Two commands do everything on a fresh machine with Python 3.10+ and a C compiler:
#
#   make demo    install into .venv, convert a small Azerbaijani model, look at it, let it write
#   make test    install into .venv with the test tools, run the linters and every test
#
# PYTHON=python3.12 picks the interpreter, VENV=folder the virtual environment, PIP_ARGS="--extra-index-url ..."
# is handed to pip, PYTEST_ARGS="-k gguf" to pytest.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_ARGS ?=
PYTEST_ARGS ?=
FUZZ_SECONDS ?= 600
BENCH_ARGS ?=

SOURCES := pyproject.toml setup.py azquant/_version.py $(wildcard csrc/*.[ch] csrc/*.py csrc/kernels/*.[ch])
MODEL := examples/az_llm_tiny
OUT := demo
GGUF := $(OUT)/az-llm-tiny-q4_0.gguf

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test build lint check-c aarch64 wheel-aarch64 fuzz bench peers bench-peers bench-model dist clean \
        distclean

# Stamps of an environment that no longer works (half made, or its interpreter is gone) count for nothing.
ifneq ($(shell $(BIN)/python -c 'import pip, sys; print(sys.version_info >= (3, 10))' 2>/dev/null),True)
$(shell rm -f $(VENV)/.made $(VENV)/.installed-*)
endif

help:
	@echo "make demo     convert the small model in $(MODEL), inspect it, let it write; results in $(OUT)/"
	@echo "make test     linters, type checker and all tests"
	@echo
	@echo "make build    install azquant into $(VENV) and no more"
	@echo "make lint     ruff and mypy only"
	@echo "make check-c  the C kernels by themselves, also under the address and thread sanitizers"
	@echo "make aarch64  the same cross-compiled for ARM and run by qemu; make wheel-aarch64: a wheel for ARM"
	@echo "make fuzz     mutated GGUF files for FUZZ_SECONDS"
	@echo "make bench    benchmarks; make peers, then make bench-peers and bench-model: against llama.cpp and others"
	@echo "make dist     source archive and wheel in dist/"
	@echo "make clean    remove what was built; make distclean: $(VENV) too"

# ---- the environment -----------------------------------------------------------------------------------

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "azquant needs Python 3.10 or later as $(PYTHON); try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "making the virtual environment $(VENV)" && $(PYTHON) -m venv --clear $(VENV); } || { \
	  echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; \
	  exit 1; }
	@touch $@

# Editable, so that a changed .py counts at once; a changed C file or dependency installs again. The old
# kernels go first: where the new ones fail to compile, the install succeeds without any.
$(VENV)/.installed-text: $(VENV)/.made $(SOURCES)
	@echo "installing azquant into $(VENV): compiling the kernels takes about half a minute"
	@rm -f azquant/_azquant.*
	@$(BIN)/python -m pip install --quiet $(PIP_ARGS) --editable ".[text]"
	@touch $@

$(VENV)/.installed-test: $(VENV)/.made $(SOURCES)
	@echo "installing azquant and its test tools into $(VENV): the first time this downloads PyTorch"
	@rm -f azquant/_azquant.*
	@$(BIN)/python -m pip install --quiet $(PIP_ARGS) --editable ".[test]"
	@touch $@ $(VENV)/.installed-text

build: $(VENV)/.installed-text
	@$(BIN)/python -c 'import azquant as a; print(f"azquant {a.__version__}: {a.backend()} kernels, {a.active_isa()}")'
	@$(KERNELS_BUILT) || true

# Where there is a compiler the kernels must be there too; without one azquant runs on NumPy.
KERNELS_BUILT = ! command -v cc >/dev/null || \
  AZQUANT_BACKEND=c $(BIN)/python -c 'import azquant; azquant.backend()' 2>/dev/null || { \
  echo "the C kernels did not compile; to see why: $(BIN)/python -m pip install -v -e ." >&2; false; }

# ---- the main job --------------------------------------------------------------------------------------

demo: build
	@mkdir -p $(OUT)
	@echo
	@echo "== 1. convert $(MODEL), a small GPT-2 trained on Azerbaijani text, to 4 bits"
	$(BIN)/azquant convert $(MODEL) $(GGUF) --type q4_0 --overwrite
	@echo
	@echo "== 2. look at the result"
	$(BIN)/azquant inspect $(GGUF) --no-tensors
	@echo "== 3. let it write: the likeliest continuation, then two draws"
	$(BIN)/azquant generate $(GGUF) "Azərbaycan" --max-tokens 60 --echo --stats
	@echo
	$(BIN)/azquant generate $(GGUF) "Bakı şəhəri" --max-tokens 60 --echo --temperature 0.7 --top-k 40 --seed 1
	@echo
	$(BIN)/azquant generate $(GGUF) "Bakı şəhəri" --max-tokens 60 --echo --temperature 0.7 --top-k 40 --seed 2
	@printf 'FROM ./%s\nTEMPLATE {{ .Prompt }}\nPARAMETER num_ctx 256\n' $(notdir $(GGUF)) > $(OUT)/Modelfile
	@echo
	@echo "== done: a $(MODEL) checkpoint became a 4-bit file and wrote the text above. The files:"
	@echo "   $(GGUF)   the model, for azquant, llama.cpp and Ollama"
	@echo "   $(OUT)/Modelfile   for Ollama: ollama create az-llm-tiny -f $(OUT)/Modelfile"

# ---- tests ---------------------------------------------------------------------------------------------

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	@$(KERNELS_BUILT)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check-c:
	$(MAKE) -C tests/c check asan tsan

# Debian and Ubuntu: apt install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
aarch64:
	$(MAKE) -C tests/c aarch64

fuzz: build
	$(BIN)/python tests/fuzz/fuzz_gguf.py --seconds $(FUZZ_SECONDS)

bench: $(VENV)/.installed-test
	$(BIN)/python -m pytest benchmarks --benchmark-only $(BENCH_ARGS)

# llama.cpp, built natively and with AVX2 alone for comparison; never in CI. PEERS=folder keeps it elsewhere,
# MODELS=folder the models of random weights (1.7 GB).
PEERS ?= build/peers
MODELS ?= build/models
peers:
	PYTHON=$(PYTHON) benchmarks/build_peers.sh $(PEERS) --avx2

bench-peers: $(VENV)/.installed-test
	AZQUANT_PEERS=$(PEERS) $(BIN)/python benchmarks/compare_matmul.py $(BENCH_ARGS)

bench-model: $(VENV)/.installed-test
	AZQUANT_PEERS=$(PEERS) $(BIN)/python benchmarks/compare_models.py --cache $(MODELS) $(BENCH_ARGS)

dist: $(VENV)/.installed-text
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) build
	rm -rf build dist
	$(BIN)/python -m build

# A wheel for 64-bit ARM Linux from another machine, without Docker: the stable ABI needs no Python of that kind, and
# the tag names the cross compiler's C library (Debian 12's). What is published cibuildwheel makes, see pyproject.toml.
# With ARM_PYTHON, a Python for ARM, the wheel is also installed, beside its dependencies from the index, and run.
# Such a Python, unpacked as root: debootstrap --arch=arm64 --foreign --include=python3 bookworm ROOT; then
# make wheel-aarch64 ARM_PYTHON="qemu-aarch64 -L ROOT ROOT/usr/bin/python3".
AARCH64_CC ?= aarch64-linux-gnu-gcc
AARCH64_TAG ?= manylinux_2_36_aarch64
AARCH64_SITE := build/aarch64-site
ARM_PYTHON ?=
# Not isolated: pip, told that this is ARM, would fill the build environment with packages for ARM.
wheel-aarch64: $(VENV)/.installed-text
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) build "setuptools>=77" "cffi>=1.17"
	rm -rf build dist/azquant-*$(AARCH64_TAG).whl
	CC="$(AARCH64_CC)" LDSHARED="$(AARCH64_CC) -shared" _PYTHON_HOST_PLATFORM=linux-aarch64 \
	  $(BIN)/python -m build --wheel --no-isolation -C--build-option=--plat-name=$(AARCH64_TAG)
	$(BIN)/python -m zipfile --list dist/azquant-*$(AARCH64_TAG).whl | grep -q '_azquant\..*so' || { \
	  echo "the kernels did not compile with $(AARCH64_CC)" >&2; false; }
ifneq ($(ARM_PYTHON),)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --target $(AARCH64_SITE) --only-binary=:all: --implementation cp \
	  --python-version $(shell $(ARM_PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])') \
	  $(foreach tag,$(AARCH64_TAG) manylinux_2_28_aarch64 manylinux_2_17_aarch64 manylinux2014_aarch64,--platform $(tag)) \
	  dist/azquant-*$(AARCH64_TAG).whl
	cd build && AZQUANT_BACKEND=c PYTHONPATH=$(notdir $(AARCH64_SITE)) $(ARM_PYTHON) -c 'import numpy as np, azquant as aq; \
	  w = aq.quantize(np.eye(64, dtype=np.float32)); y = aq.matmul(np.ones((3, 64), np.float32), w); \
	  assert abs(y - 1).max() < 0.05; print("the wheel runs:", aq.backend(), aq.isas(), aq.__file__)'
else
	@echo "built, not run: ARM_PYTHON is not set"
endif

clean:
	rm -rf build dist $(OUT) tests/c/build *.egg-info azquant/_azquant.* .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(VENV)/.installed-*
	find azquant tests benchmarks examples csrc -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
