# Everything a person repeats. `make help` lists it.
SHELL := bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
STAMP := $(VENV)/.synced
UV_VERSION := 0.13.9

.DEFAULT_GOAL := help
.PHONY: help setup tools charts demo test lint fmt bench bench-router bench-virtual bench-client bench-attack fuzz compiled compiled-virtual chaos churn validate policies referee cluster e2e upstream-tests test-engines screens docs clean

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
	@VIRTUAL_ENV= $(UV) sync --quiet --frozen --inexact --all-packages --all-groups --no-group fuzz --no-group upstream --python $(BIN)/python
	@touch $(STAMP)

tools: setup ## Programs that the tests of the charts call, into .tools: linked, or built with Go and kept for the next time
	@bash scripts/tools.sh
	@bash scripts/browser.sh

charts: tools ## Write each chart's README and schema from the comments of its values, and the rendered deployment
	@$(BIN)/python scripts/charts.py

demo: setup ## Bring up 8 prefill + 8 decode simulated engines and the router, send traffic, show what happened, clean up
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo.sh

TEST_PROCESSES ?= 3
test: lint tools ## Install what is needed and run every check and test (TEST_PROCESSES=3 side by side)
	@$(BIN)/pytest -n $(TEST_PROCESSES)

lint: setup ## ruff and mypy --strict
	@$(BIN)/ruff format --check --quiet . || { echo "lint: run make fmt"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy

fmt: setup ## Format the code and apply safe fixes
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --fix --quiet .

bench: setup ## One simulated pair beside the measured figures of two H200 (5 minutes)
	@$(BIN)/python bench/h200_pair.py

validate: setup ## The virtual fleet beside the one in real time and the figures of two H200 (5 minutes on a quiet machine)
	@VALIDATE_REQUESTS=$${VALIDATE_REQUESTS:-300} VALIDATE_SPEED=$${VALIDATE_SPEED:-0.5} VALIDATE_POLICIES=$${VALIDATE_POLICIES:-round_robin,least_tokens,pd_cost} $(BIN)/pytest -q -s -rs --timeout=1800 tests/virtual/test_validation.py

policies: compiled-virtual ## Judge every policy on the conversation trace and made-up traffic: TRACE=conversation_trace.jsonl; writes docs/policies.md (half an hour on one core; goes on where it was)
	@PYTHONPATH=.build/virtual $(BIN)/python scripts/policies.py $(TRACE)

compiled: setup ## The router compiled by mypyc, in .build/router (half a minute)
	@bash scripts/compiled_router.sh

compiled-virtual: setup ## The virtual fleet and its policies compiled by mypyc, in .build/virtual: PYTHONPATH=.build/virtual takes them (half a minute)
	@bash scripts/compiled_virtual.sh

bench-virtual: compiled-virtual ## Simulated requests a second with each policy: TRACE=conversation_trace.jsonl (two minutes)
	@PYTHONPATH=.build/virtual $(BIN)/python bench/virtual_speed.py $(TRACE)

bench-router: setup ## CPU, latency and memory of the router beside vllm-router and nginx (10 minutes; REPORT=docs/performance.md writes the table there)
	@$(BIN)/python bench/router/run.py $(if $(REPORT),--report $(REPORT))

bench-client: setup ## The load generator beside AIPerf and the real vllm bench serve, and its cost a token (15 minutes; VLLM=PROGRAM for the latter)
	@$(BIN)/python bench/client/agreement.py --vllm "$(VLLM)"

bench-attack: setup ## What attacks cost other clients: p99 of ordinary requests without and with each (5 minutes; REPORT=docs/security.md writes the table there)
	@$(BIN)/python bench/router/attack.py $(if $(REPORT),--report $(REPORT))

FUZZ_SECONDS ?= 600
fuzz: setup ## Fuzz the router's request path, guided by coverage and not (FUZZ_SECONDS=600)
	@VIRTUAL_ENV= $(UV) sync --quiet --frozen --inexact --all-packages --group fuzz --python $(BIN)/python || echo "fuzz: going on without Atheris"
	@$(BIN)/python scripts/fuzz.py --seconds $(FUZZ_SECONDS)

chaos: setup ## Five minutes of faults under load, every text compared (CHAOS_SEED=N for another order, CHAOS_SECONDS for another time)
	@CHAOS_SECONDS=$${CHAOS_SECONDS:-300} $(BIN)/pytest -q -s --timeout=1800 tests/chaos/test_schedule.py

churn: compiled ## A day's coming and going of engines, clients and workers in ten minutes: does anything leak?
	@$(BIN)/python bench/router/churn.py

cluster: setup tools ## A real Kubernetes control plane with fake GPU nodes, to try things by hand, until Ctrl-C (needs root; REAL=1 for real kubelets)
	@PYTHONPATH=tests $(BIN)/python -m cluster $(if $(REAL),--real)

e2e: setup tools ## The charts on two real kubelets: deploy, chat, load, faults, rollouts, cleanup (5 minutes; needs root and Debian 12)
	@$(BIN)/pytest -rs tests/cluster/test_real_nodes.py

screens: setup tools ## Record what pdctl shows in a deployment's life; writes docs/screens.md (3 minutes; needs root)
	@PYTHONPATH=tests $(BIN)/python -m cluster.screens

referee: setup ## Judge the router and others by pd-referee; writes docs/referee.md (10 minutes; ROUTERS="ours toy" for some)
	@$(BIN)/python scripts/referee.py $(ROUTERS)

upstream-tests: setup ## vllm-router's own integration tests before our router: ROUTER=its checkout (4 minutes; REPORT=docs/upstream-tests.md writes the table there)
	@$(BIN)/python tests/upstream/run.py $(ROUTER) $(if $(REPORT),--report $(REPORT))

test-engines: setup ## Tests over real vLLM engines (15 minutes; VLLM=DIR, DIR holding venv with vLLM's CPU build and NIXL, and model)
	@[ -n "$(VLLM)" ] || { echo "test-engines: say where real vLLM is: make test-engines VLLM=DIR"; exit 1; }
	@VLLM="$(VLLM)" $(BIN)/pytest tests/engines

docs: setup ## Write docs/reference.md, docs/metrics.md and the referee's list of cases from the programs themselves
	@$(BIN)/python scripts/reference.py

clean: ## Remove the virtual environment and caches
	@rm -rf $(VENV) .build .mypy_cache .ruff_cache .pytest_cache .hypothesis
