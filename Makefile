# make demo: the whole way on the built-in world.  make test: the test suite.  Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= runs/demo
# A process a core, of which each takes whole files; not more than eight, as many tests start ranks of their own.
SIDE_BY_SIDE := -n auto --maxprocesses 8 --dist loadfile

.PHONY: demo test test-all lint types venv

demo: $(STAMP)
	$(BIN)/videodit demo --out "$(OUT)"

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" $(SIDE_BY_SIDE)

test-all: $(STAMP)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

venv: $(STAMP)

# The stamp is written last, so that an interrupted installation is taken up again. DeepSpeed comes as source: its
# isolated build needs setuptools only (seen with 0.19.8); its kernels are compiled when first used.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: videodit needs Python 3.10 or later: make $(or $(MAKECMDGOALS),venv) PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@
