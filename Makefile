# Everything a person repeats. `make help` lists it.
SHELL := bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
STAMP := $(VENV)/.synced
UV_VERSION := 0.13.9

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint fmt bench bench-router bench-attack fuzz compiled docs clean

help: ## List the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Install the workspace and its tools into .venv (quick when nothing changed)

$(UV):
	@echo "setup: making $(VENV) with uv $(UV_VERSION)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "setup: $(PYTHON) is older than Python 3.11; call make PYTHON=python3.12 (or newer)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "setup: $(PYTHON) cannot make a virtual environment; install its venv package (Debian: python3-venv)"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

$(STAMP): $(UV) uv.lock pyproject.toml cli/pyproject.toml router/pyproject.toml simulator/pyproject.toml
	@echo "setup: installing the workspace from uv.lock"
	@VIRTUAL_ENV= $(UV) sync --quiet --frozen --inexact --all-packages --all-groups --no-group fuzz --python $(BIN)/python
	@touch $(STAMP)

demo: setup ## Bring up 8 prefill + 8 decode simulated engines and the router, send traffic, show what happened, clean up
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo.sh

test: lint ## Install what is needed and run every check and test
	@$(BIN)/pytest

lint: setup ## ruff and mypy --strict
	@$(BIN)/ruff format --check --quiet . || { echo "lint: run make fmt"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy

fmt: setup ## Format the code and apply safe fixes
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --fix --quiet .

bench: setup ## One simulated pair beside the measured figures of two H200 (5 minutes)
	@$(BIN)/python bench/h200_pair.py

compiled: setup ## The router compiled by mypyc, in .build/router (half a minute)
	@bash scripts/compiled_router.sh

bench-router: setup ## CPU, latency and memory of the router beside vllm-router and nginx (10 minutes; REPORT=docs/performance.md writes the table there)
	@$(BIN)/python bench/router/run.py $(if $(REPORT),--report $(REPORT))

bench-attack: setup ## What attacks cost other clients: p99 of ordinary requests without and with each (5 minutes; REPORT=docs/security.md writes the table there)
	@$(BIN)/python bench/router/attack.py $(if $(REPORT),--report $(REPORT))

FUZZ_SECONDS ?= 600
fuzz: setup ## Fuzz the router's request path, guided by coverage and not (FUZZ_SECONDS=600)
	@VIRTUAL_ENV= $(UV) sync --quiet --frozen --inexact --all-packages --group fuzz --python $(BIN)/python || echo "fuzz: going on without Atheris"
	@$(BIN)/python scripts/fuzz.py --seconds $(FUZZ_SECONDS)

docs: setup ## Write docs/reference.md and docs/metrics.md from the programs themselves
	@$(BIN)/python scripts/reference.py

clean: ## Remove the virtual environment and caches
	@rm -rf $(VENV) .build .mypy_cache .ruff_cache .pytest_cache .hypothesis
