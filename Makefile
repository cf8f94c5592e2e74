# Two commands on a fresh machine with python3 and make: `make demo` and `make test`.
# Both set up .venv first, and again only when pyproject.toml has changed.

PYTHON ?= python3
PIP_QUIET ?= --quiet
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test slow lint types docs notebooks check clean help

help:  ## list the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

demo: $(READY)  ## train a small net with and without batch norm, under two minutes
	@$(BIN)/python -m experiments demo

test: $(READY)  ## the fast tests, about four minutes
	@$(BIN)/python -m pytest -m "not slow" -n 2 --quiet

slow: $(READY)  ## the tests that take minutes
	@$(BIN)/python -m pytest -m slow --quiet

lint: $(READY)  ## style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(READY)  ## static types of the library
	@$(BIN)/pyrefly check

docs: $(READY)  ## the documentation, to read from docs/_build/html/docs/index.html; warnings are errors
	@$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --conf-dir docs --builder html . docs/_build/html
	@echo docs/_build/html/docs/index.html

notebooks: $(READY)  ## execute the notebooks, and keep their outputs
	@$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/*.ipynb

check: test lint types docs slow  ## all tests and checks on this Python

clean:  ## remove the environment; results and data stay
	rm -rf .venv

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jaxbn needs Python 3.11 or newer; found $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	@echo "Setting up .venv (once; a few minutes) ..."
	@rm -rf .venv
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install $(PIP_QUIET) --disable-pip-version-check --editable '.[dev]'
	@touch $@
