# make quickstart   set up, then prune, prove and report on the built-in model
# make test         set up, then run all tests
# make test-fast    the tests that take seconds
# make lint         style and types

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup quickstart test test-fast lint schema clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "bipdeploy needs Python 3.11 or later; set PYTHON=python3.12, say"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing (PyTorch is large: minutes on a slow line)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

quickstart: setup
	$(BIN)/bipdeploy run recipes/quickstart.yaml

test: setup
	$(BIN)/pytest

test-fast: setup
	$(BIN)/pytest -m 'not slow'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

schema: setup
	$(BIN)/bipdeploy schema > recipes/schema.json

clean:
	rm -rf $(VENV) build *.egg-info
