# Everything runs in a virtual environment this file makes: a machine needs Python >= 3.11 and git.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint .ci/constraints.txt

# Of make conform: how hard it searches (smoke, ci or thorough). Of make mutants too: in how many
# processes.
PROFILE ?= smoke
JOBS ?= $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')

# Cases are small: one thread inside NumPy and torch, two where Numba's own parallelism is tested.
export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
export NUMBA_NUM_THREADS ?= 2
export MPLBACKEND := Agg

.PHONY: help conform test lint types unit interpret mutants docs format clean

help:
	@echo "make conform    certify the fast kernels on this CPU; table, JSON, JUnit and HTML in build/"
	@echo "make test       everything that runs before a merge:"
	@echo "  make lint       ruff check, ruff format --check"
	@echo "  make types      mypy on the package as it is installed"
	@echo "  make unit       the tests and doctests, with coverage"
	@echo "  make interpret  the Triton kernels in Triton's interpreter"
	@echo "  make docs       the documentation, warnings are errors; build/docs/index.html"
	@echo "make mutants    which law catches which wrong kernel, in build/mutants.json"
	@echo "make format     ruff format, and the fixes ruff is sure of"
	@echo "make clean      remove $(VENV), build and caches"

conform: $(READY)
	$(BIN)/attnspec conform --device cpu --profile $(PROFILE) --jobs $(JOBS) \
	    --json build/conformance.json --junit build/conformance.xml --html build/conformance.html

test: lint types unit interpret docs

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# An editable install is opaque to mypy, and a stale build/lib would keep deleted modules alive.
types: $(READY)
	rm -rf build/lib build/installed
	$(PIP) --no-deps --no-build-isolation --target build/installed .
	rm -rf build/lib build/bdist.*
	MYPYPATH=build/installed $(BIN)/mypy -p attnspec

unit: $(READY)
	$(BIN)/python -m pytest --ignore tests/interpret --numprocesses auto --dist worksteal \
	    --junit-xml build/unit.xml \
	    --cov reference --cov fast --cov conformance \
	    --cov-report term:skip-covered --cov-report html:build/coverage

# The interpreter is chosen when Triton is imported, so these tests need a process of their own.
interpret: $(READY)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/interpret --numprocesses auto --dist worksteal \
	    --junit-xml build/interpret.xml

# The unit tests kill each mutant as well; this leaves the table.
mutants: $(READY)
	$(BIN)/attnspec mutants --jobs $(JOBS) --json build/mutants.json

docs: $(READY)
	$(BIN)/sphinx-build -W --keep-going -q -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build docs/chapters .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage

$(READY): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "attnspec needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1);" \
	        "name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) pip setuptools
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@
