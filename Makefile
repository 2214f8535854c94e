# Everything runs in .venv, made here by $(PYTHON) 3.10 or newer; another PYTHON has a folder of its
# own, so that `make test PYTHON=python3.13` stands beside it. A change of what is installed or
# compiled (see SOURCES) installs again; a change of Python code does not need to.

PYTHON ?= python3
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist worksteal --durations 10
BENCH_ARGS ?=
TRITON ?= 3.6
PYTHON_SEMANTICS ?= python3.12

VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
# Bytecode is kept, whatever the shell says: a process that a test starts imports torch in half the time.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OTHER_TRITON := build/triton-$(patsubst %.*,%,$(TRITON))
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard build_support/*.py csrc/*.* csrc/*/*.*)
CPP := $(wildcard csrc/*.* csrc/*/*.*) $(shell find tests -name "*.cpp" -o -name "*.h")
KERNELS := tests/kernels/cuda tests/kernels/triton

.PHONY: venv install bench families test test-slow test-kernels test-triton test-semantics test-all
.PHONY: kernel-report lint format docs pictures wheel clean help

# The first target, so that `make` alone tells what there is.
help:
	@echo "make bench          time frozen, naive LoRA, PEFT and fused steps here: a table, report.html"
	@echo "make test           what a user asks: parity, gradients, patching, files, stacks, distillation"
	@echo "make test-slow      the same at more sizes, and whole scripts"
	@echo "make test-kernels   every kernel without a GPU: compiled, interpreted, emulated"
	@echo "make test-triton TRITON=3.6   Triton's kernels by another version"
	@echo "make test-semantics each Triton kernel once by ttsem: out of bounds, races (Python 3.12)"
	@echo "make test-all       test, test-slow and test-kernels"
	@echo "make lint, format   what the commits are held to; what mends it"
	@echo "make docs           the site, in build/site/index.html; make pictures: its pictures from rows"
	@echo "make families       docs/families.md anew"
	@echo "make kernel-report  docs/kernel_report.md anew: registers, occupancy, conflicts, cycles"
	@echo "make install        the package with the compiled module for every architecture"
	@echo "make wheel, clean   a wheel in dist/; everything made here gone"
	@echo "PYTHON=python3.13 for another Python, in an environment of its own"

venv: $(BIN)/python

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 is needed')"
	$(PYTHON) -m venv $(VENV)

install: $(VENV)/.installed

# The package with the compiled module for every architecture.
$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	$(PIP) install --no-compile --editable .
	touch $@

# What an extra asks for, on top of the package; compiled for the GPUs of this machine alone.
$(VENV)/.installed-%: export FUSED_LORA_NATIVE ?= here
$(VENV)/.installed-%: $(SOURCES) | $(BIN)/python
	@$(BIN)/python -m build_support.here
	$(PIP) install --no-compile --editable ".[$*]"
	touch $@

bench: $(VENV)/.installed-bench
	$(BIN)/fused-lora bench $(BENCH_ARGS)

families: $(VENV)/.installed-test
	$(BIN)/python -m fused_lora.testing.families.table docs/families.md

# A process per core, each with one thread.
test test-slow test-kernels test-triton test-all: export OMP_NUM_THREADS ?= 1

# What a user asks: parity, gradients, patching, files, stacks, distillation on tiny data.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow" $(KERNELS:%=--ignore=%)

# The same at more sizes, and whole scripts.
test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m slow $(KERNELS:%=--ignore=%)

# Every kernel without a GPU: compiled for every architecture, interpreted, emulated.
test-kernels: $(VENV)/.installed-test $(VENV)/.installed
	$(BIN)/python -m pytest $(PYTEST_ARGS) $(KERNELS)

test-all: test test-slow test-kernels

# Triton's kernels compiled and interpreted by another version: make test-triton TRITON=3.6
test-triton: $(VENV)/.installed-test $(OTHER_TRITON)/.installed
	PYTHONPATH=$(CURDIR)/$(OTHER_TRITON) $(BIN)/python -m pytest $(PYTEST_ARGS) tests/kernels/triton

# The interpreter of 3.6 needs numpy below 2.4.
build/triton-%/.installed: | $(BIN)/python
	$(PIP) install --no-deps --target $(@D) "triton==$*.*" "numpy<2.4"
	touch $@

# Each kernel of Triton's once, what it compiles to executed on a CPU by ttsem: accesses beyond a
# tensor, races between programs. An environment of its own, for ttsem knows one Triton.
test-semantics: .venv-semantics/.installed
	OMP_NUM_THREADS=1 .venv-semantics/bin/python -m ttsem.sanitize pytest \
		-m gpu -q --durations 0 -p no:cacheprovider tests/kernels/triton/test_semantics.py

.venv-semantics/.installed:
	$(PYTHON_SEMANTICS) -m venv .venv-semantics
	.venv-semantics/bin/python -m pip --disable-pip-version-check install --no-compile \
		"torch==2.14.0" "triton==3.8.0" "ttsem==0.1.0" pytest numpy
	touch $@

# What each compiled kernel takes, and its main loop's cycles, by cuxray.
kernel-report: $(VENV)/.installed-dev $(VENV)/.installed-test build/triton-3.6/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kernels.kernel_report docs/kernel_report.md

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/typos
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The site, in build/site; a link to nowhere fails it.
docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --quiet

# What the site shows of committed rows, anew.
pictures: $(VENV)/.installed-docs
	$(BIN)/python docs/make_memory.py docs/memory.md
	$(BIN)/python docs/make_pictures.py

wheel: $(BIN)/python
	rm -rf build/lib* build/bdist*
	$(PIP) wheel --no-deps --wheel-dir dist .

clean:
	rm -rf .venv .venv-* build dist *.egg-info fused_lora/_native*.so
	rm -rf .pytest_cache .ruff_cache .mypy_cache .benchmarks
