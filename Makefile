# LoopServe from a checkout: pip and a virtual environment, nothing else. `make` alone explains itself.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/set-up.stamp
TOOLS := .tools

# Passed on to `loopserve serve` where they are set, here or in the environment.
SERVE_FLAGS = $(if $(HOST),--host "$(HOST)") $(if $(PORT),--port "$(PORT)") $(if $(REPLICAS),--replicas "$(REPLICAS)") \
              $(if $(MODEL),--model "$(MODEL)") $(if $(DEVICE),--device "$(DEVICE)")
OBSERVE_FLAGS = $(if $(DIALOGUES),--dialogues "$(DIALOGUES)") $(if $(RATE),--rate "$(RATE)") $(if $(MINUTES),--minutes "$(MINUTES)")

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve observe test test-slow dashboards manifests tools constraints clean

help: ## this list
	@echo "make TARGET [NAME=value ...]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "serve reads HOST (127.0.0.1), PORT (8000), REPLICAS (1), MODEL (hub id or directory; the shipped model), DEVICE (auto)."
	@echo "observe reads HOST, PORT, REPLICAS (2), MODEL, DEVICE, DIALOGUES (16), RATE (dialogues begun per second), MINUTES (30)."
	@echo "Set-up reads PYTHON (python3, 3.11 or newer) and pip's own environment variables."

serve: $(STAMP) ## set up if needed, then serve at http://127.0.0.1:8000
	@exec $(BIN)/loopserve serve $(SERVE_FLAGS)

observe: $(STAMP) ## set up if needed, then serve under load with a live page at http://127.0.0.1:8000/observe
	@exec $(BIN)/loopserve observe $(SERVE_FLAGS) $(OBSERVE_FLAGS)

test: $(STAMP) ## set up if needed, then lint, types and tests
	@echo "ruff check";          $(BIN)/ruff check .
	@echo "ruff format --check"; $(BIN)/ruff format --check .
	@echo "mypy --strict";       $(BIN)/mypy
	@echo "pytest";              $(BIN)/python -m pytest
	@echo "pytest, kernels interpreted"; TRITON_INTERPRET=1 LOOPSERVE_KERNELS=kernel $(BIN)/python -m pytest tests/kernels

test-slow: $(STAMP) ## the tests that take longer than a minute each
	@$(BIN)/python -m pytest -m slow

dashboards: $(STAMP) ## write the dashboards' JSON and the alert rules' YAML again from their builders
	@$(BIN)/python -m monitoring.dashboards
	@$(BIN)/python -m monitoring.alerts

manifests: $(STAMP) ## write what follows from the Helm chart again: its schema of settings, its copies of rules and dashboards, plain manifests
	@$(BIN)/python k8s/render.py

pictures: $(STAMP) tools ## draw the dashboards again from minutes of load here (Node and Chromium needed)
	@npm ci --prefix monitoring/drawing --ignore-scripts --no-audit --no-fund --loglevel=error
	@npm run --silent --prefix monitoring/drawing build
	@$(BIN)/python -m benchmarks.cluster.pictures

tools: $(TOOLS)/usr/bin/promtool ## Prometheus from Debian's package, unpacked into .tools, not installed: for the tests of alerts and panels

constraints: $(STAMP) ## resolve constraints.txt again from pyproject.toml
	@$(BIN)/python -m pip install --quiet uv
	@$(BIN)/uv pip compile --quiet --universal --upgrade --extra test --no-header --no-annotate --no-emit-index-url \
		--output-file constraints.txt pyproject.toml

clean: ## remove the virtual environment and every cache
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Nothing is installed and no service starts: the package is only unpacked. Its signature is checked by apt.
$(TOOLS)/usr/bin/promtool:
	@command -v apt-get >/dev/null && command -v dpkg >/dev/null || { \
		echo "There is no apt here. Get Prometheus for this system, then set PROMETHEUS and PROMTOOL to its two programs." >&2; exit 1; }
	@rm -rf $(TOOLS) && mkdir -p $(TOOLS)
	@cd $(TOOLS) && apt-get -qq -o APT::Sandbox::User="$$(id -un)" download prometheus || { \
		echo "apt could not fetch the package prometheus. Are its lists there? (apt-get update) Or set PROMETHEUS and PROMTOOL." >&2; exit 1; }
	@cd $(TOOLS) && dpkg -x prometheus_*.deb . && rm prometheus_*.deb
	@touch $@
	@echo "Prometheus is in $(TOOLS)/usr/bin"

# The stamp comes last, so that a set-up that failed half-way is tried again.
$(STAMP): pyproject.toml constraints.txt
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; choose one with make PYTHON=...")'
	@echo "Setting up $(VENV) (the first time this fetches PyTorch and Ray: some minutes)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@
	@echo "Set-up done"
