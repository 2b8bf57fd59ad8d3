# Phalanx: every target works alone on a fresh machine with Python 3.11 or newer.
#   make train                       environment, demo text, a four-rank run on the CPU
#   make train ARGS="data=stdlib"    the same with overrides, see `phalanx train --help`
#   make env TORCH="torch --index-url https://download.pytorch.org/whl/cu128"    another torch

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
TORCH_VERSION := 2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

# Arguments of `phalanx data prepare` and `phalanx train`, and of pytest.
ARGS ?=

# A torch asked for that is not the one that stands is installed anew; without TORCH, the one that
# stands is kept.
ifdef TORCH
ifneq ($(strip $(TORCH)),$(shell cat $(VENV)/.torch 2>/dev/null))
.PHONY: $(VENV)/.torch
endif
endif

.PHONY: help env dev train test test-slow lint clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(VENV)/.core ## Build .venv/ with the `phalanx` command in it; TORCH="..." chooses a build of torch.

dev: $(VENV)/.dev ## env, and what tests and checks need.

train: $(VENV)/.core ## Prepare the demo text and train on it; ARGS="key=value ..." are overrides.
	$(BIN)/phalanx data prepare $(ARGS)
	$(BIN)/phalanx train $(ARGS)

test: $(VENV)/.dev ## Run the tests that take seconds each; ARGS="-k name" are pytest's.
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(VENV)/.dev ## Run all tests.
	$(BIN)/python -m pytest -m "" $(ARGS)

lint: $(VENV)/.dev .typing/phalanx ## Check style, types, import direction and spelling.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

clean: ## Remove the environment and caches; runs/ and datasets/ stay.
	rm -rf $(VENV) .typing build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- files behind the targets ---------------------------------------------------------------------

$(BIN)/python:
	@for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "$$python -m venv $(VENV)"; $$python -m venv $(VENV); exit; \
	    fi; \
	done; echo "No Python 3.11 or newer found; name one with make env PYTHON=/path/to/python3" >&2; exit 1

# CPU builds only, unless TORCH says otherwise: an unqualified torch on Linux brings gigabytes of CUDA.
$(VENV)/.torch: | $(BIN)/python
ifdef TORCH
	$(BIN)/python -m pip uninstall --quiet --yes torch
	$(PIP) $(TORCH)
	echo '$(strip $(TORCH))' > $@
else ifeq ($(shell uname),Darwin)
	$(PIP) torch==$(TORCH_VERSION)
	echo cpu > $@
else
	$(PIP) torch==$(TORCH_VERSION)+cpu 2>/dev/null \
	    || $(PIP) torch==$(TORCH_VERSION)+cpu --extra-index-url $(TORCH_CPU_INDEX) \
	    || { echo "No CPU build of torch in reach; choose one: make env TORCH=torch==$(TORCH_VERSION)" >&2; exit 1; }
	echo cpu > $@
endif

$(VENV)/.core: pyproject.toml $(VENV)/.torch
	$(PIP) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) --editable '.[dev]'
	touch $@

# The packages live at the top level but import as `phalanx.*`; type checkers see that through a link.
.typing/phalanx:
	mkdir -p .typing
	ln -sfn .. $@
