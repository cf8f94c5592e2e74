# On a fresh machine with python3 and make, start with `make demo` or `make test`.
# The first command creates .venv, which is only rebuilt after a change of pyproject.toml.

PYTHON ?= python3
PIP_QUIET ?= --quiet
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test slow lint types docs notebooks check clean help

help:  ## list these commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

demo: $(READY)  ## train a small network with and without batch norm: under two minutes
	@$(BIN)/python -m experiments demo

test: $(READY)  ## run the fast tests: 3 min on two cores, 6 min of CPU time
	@$(BIN)/python -m pytest -m "not slow" -n 2 --quiet

slow: $(READY)  ## run the slow tests
	@$(BIN)/python -m pytest -m slow -n 2 --quiet

lint: $(READY)  ## check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(READY)  ## check the types of the library
	@$(BIN)/pyrefly check

docs: $(READY)  ## build docs/_build/html/docs/index.html; warnings are errors
	@$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --conf-dir docs --builder html . docs/_build/html
	@echo docs/_build/html/docs/index.html

notebooks: $(READY)  ## execute the notebooks and store their outputs
	@$(BIN)/jupyter nbconvert --to notebook --execute --inplace --coalesce-streams \
	  --ExecutePreprocessor.record_timing=False notebooks/*.ipynb

check: test lint types docs slow  ## run all tests and checks on this Python

clean:  ## remove .venv; results and data are kept
	rm -rf .venv

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jaxbn needs Python 3.11 or newer; found $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	@echo "Creating .venv (once; one or two minutes) ..."
	@rm -rf .venv
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install $(PIP_QUIET) --disable-pip-version-check --editable '.[dev]'
	@touch $@
