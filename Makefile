# The two commands of a newcomer: `make quickstart` and `make test`. pip's environment variables are honoured;
# `make PYTHON=python3.12 …` takes another Python.
PYTHON ?= python3
VENV := .venv
BIN = $(VENV)/bin
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

.PHONY: quickstart test equivalence test-oldest faults slurm lint format clean

quickstart: $(VENV)/installed
	$(BIN)/tsumugu quickstart

test: $(VENV)/installed .venv-transformers4
	$(PYTEST)

# every mesh × accumulation × recomputation × compile, of which `make test` takes a covering part (hours)
equivalence: $(VENV)/installed
	TSUMUGU_EQUIVALENCE=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --timeout 0 tests/training/test_equivalence.py \
		tests/distributed

# what touches torch and transformers, with the oldest versions that the package allows
test-oldest: VENV := .venv-oldest
test-oldest: .venv-oldest/installed
	$(PYTEST) tests/model tests/training tests/test_export.py tests/test_generate.py

# a hundred runs that are killed, stopped and damaged; every one must end as the undisturbed run
faults: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/harness.py --runs 100

# real jobs on a cluster of one node that the tests start themselves (Debian: apt-get install slurm-wlm)
slurm: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs tests/test_launch_slurm.py tests/distributed/test_slurm.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-oldest .venv-transformers4

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

.venv-oldest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet 'torch==2.11.*' 'transformers==5.17.*' setuptools
	.venv-oldest/bin/python -m pip install --quiet --no-build-isolation --editable '.[dev]'
	touch $@

include tests/transformers4.mk
