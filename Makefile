# Every target creates what it needs. PYTHON may name any Python 3.11 to 3.13.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread in each of several processes: the networks of the tests are too small for more. Whole modules stay together,
# so that what their tests share is made once; more than four processes spend their time importing.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadscope
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-full lint docs bench clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt zoo/pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else "Sedimo needs Python 3.11 to 3.13, this is %d.%d; call: make PYTHON=python3.12" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ./zoo --editable '.[dev,docs]'
	touch $@

install: $(STAMP)  ## Create .venv with everything that development needs

demo: $(STAMP)  ## Quantize the embedded model end to end and write a report
	$(BIN)/sedimo demo

lint: $(STAMP)  ## Style, types, import layers, sizes
	$(BIN)/ruff check src tests benchmarks scripts zoo
	$(BIN)/ruff format --check src tests benchmarks scripts zoo
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/size.py

test: lint  ## Lint, then all tests that need seconds, in random order
	$(PYTEST) -m "not slow and not gpu and not network"

test-full: lint docs  ## Lint, the documents, then all tests that this machine can run
	SEDIMO_TEST_ALL_EXAMPLES=1 $(PYTEST) -m "not slow and not network"
	SEDIMO_TEST_ALL_EXAMPLES=1 SEDIMO_TEST_KERNELS=native $(PYTEST) -m "slow and not network"

docs: $(STAMP)  ## The documents as a site in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP)  ## The benchmarks that docs/results quotes (hours)
	$(BIN)/python benchmarks/run_all.py

clean:  ## Remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
