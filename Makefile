# Everything runs in .venv, made here by $(PYTHON) 3.10 or newer. A change of what is installed or
# compiled (see SOURCES) installs again; a change of Python code does not need to.

PYTHON ?= python3
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist worksteal
BENCH_ARGS ?=
TRITON ?= 3.6

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OTHER_TRITON := build/triton-$(patsubst %.*,%,$(TRITON))
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard build_support/*.py csrc/*.* csrc/*/*.*)
CPP := $(wildcard csrc/*.* csrc/*/*.*) $(shell find tests -name "*.cpp" -o -name "*.h")

.PHONY: venv install bench families test test-triton lint format wheel clean

venv: $(BIN)/python

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 is needed')"
	$(PYTHON) -m venv $(VENV)

install: $(VENV)/.installed

$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	$(PIP) install --no-compile --editable .
	touch $@

# What an extra asks for, on top of the package.
$(VENV)/.installed-%: $(SOURCES) | $(BIN)/python
	$(PIP) install --no-compile --editable ".[$*]"
	touch $@ $(VENV)/.installed

bench: $(VENV)/.installed-bench
	$(BIN)/fused-lora bench $(BENCH_ARGS)

families: $(VENV)/.installed-test
	$(BIN)/python -m fused_lora.testing.families.table docs/families.md

# A process per core, each with one thread.
test test-triton: export OMP_NUM_THREADS ?= 1
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Triton's kernels compiled and interpreted by another version: make test-triton TRITON=3.6
test-triton: $(VENV)/.installed-test $(OTHER_TRITON)/.installed
	PYTHONPATH=$(CURDIR)/$(OTHER_TRITON) $(BIN)/python -m pytest $(PYTEST_ARGS) tests/kernels/triton

# The interpreter of 3.6 needs numpy below 2.4.
build/triton-%/.installed: | $(BIN)/python
	$(PIP) install --no-deps --target $(@D) "triton==$*.*" "numpy<2.4"
	touch $@

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

wheel: $(BIN)/python
	rm -rf build/lib* build/bdist*
	$(PIP) wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info fused_lora/_native*.so
	rm -rf .pytest_cache .ruff_cache .mypy_cache .benchmarks
