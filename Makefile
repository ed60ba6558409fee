# What people and CI call. Every target sets up .venv by itself, once.
SHELL := /bin/bash
PYTHON ?= python3
RECIPE ?= demo
BIN := .venv/bin
# Processes that share the cores wait for each other instead of spinning.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

run: $(BIN)/ready  ## Run a recipe here from end to end: RECIPE=demo, another name, or a path
	@$(BIN)/tune16 run $(RECIPE)

test: $(BIN)/ready .venv/checkov/ready lint  ## Lint, types and all tests
	@$(BIN)/pytest

lint: $(BIN)/ready  ## Lint and types only
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

quick: $(BIN)/ready  ## The tests that take seconds
	@$(BIN)/pytest -m "not slow"

compile: $(BIN)/ready  ## Write manifests/base/pipeline.yaml and the page of settings
	@$(BIN)/tune16 compile
	@$(BIN)/python -m components knobs > components/KNOBS.md

manifests: $(BIN)/ready .venv/checkov/ready  ## Build every overlay, validate every object, check the security
	@$(BIN)/pytest tests/manifests

bench: $(BIN)/ready  ## The benchmarks that need no GPU
	@for script in tests/bench/bench_*.py; do $(BIN)/python $$script || exit 1; done

clean:  ## Remove what the targets made
	rm -rf .venv runs build *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(BIN)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[trainer,pipelines,dev]'
	@touch $@

# checkov pins a boto3 that is older than ours.
.venv/checkov/ready: tests/manifests/checkov.txt
	$(PYTHON) -m venv .venv/checkov
	.venv/checkov/bin/pip install --quiet -r $<
	@touch $@

.PHONY: help run test lint quick compile manifests bench clean
