# `make help` says what there is. Everything is installed into .venv, from constraints.txt, by itself.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
NPROC ?= 2
RECIPE ?= recipes/gpt_stdlib.yaml
STEPS ?=
PLAN ?=
FRESH ?=
QUICK ?=
TESTS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench

# A shorter run or another plan is another run: it gets a folder of its own, and the full one is left alone.
EMPTY :=
WORDS := $(if $(STEPS),_$(STEPS)_steps)$(if $(PLAN),_$(subst $(EMPTY) ,_,$(strip $(subst =,-,$(PLAN)))))
FOLDER := runs/$(basename $(notdir $(RECIPE)))$(WORDS)
SETTINGS := $(if $(STEPS),train.steps=$(STEPS)) $(foreach word,$(PLAN),plan.$(word)) $(if $(WORDS),folder=$(FOLDER))

.PHONY: train test test-mpi matrix check bench clean help

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  make train STEPS=100                       shorter'
	@echo '  make train PLAN="zero=3 precision=bf16"    another plan: any keys of the section plan'
	@echo '  make train FRESH=1                         anew; the earlier run is moved aside'
	@echo '  make train NPROC=4 RECIPE=my.yaml          more processes, another recipe'
	@echo '  make test TESTS=tests/monitor              some of the tests'
	@echo '  make bench QUICK=1                         only to see that the benchmarks run; tables in build/bench/'
	@echo '  PYTHON=python3.12 make train               another interpreter for .venv'

train: $(STAMP) ## train a small GPT on 2 processes; a second time it goes on where it was, see FRESH
	@if [[ -z "$(FRESH)" && -e "$(FOLDER)/metrics.jsonl" ]]; then \
	    echo "$(FOLDER) holds an earlier run, which goes on if it is not finished. To start anew: make train FRESH=1"; fi
	@$(BIN)/trainfleet train $(RECIPE) --nproc $(NPROC) --resume $(if $(FRESH),never,auto) $(SETTINGS)

test: $(STAMP) ## run the tests, without their long forms
	@$(BIN)/python -m pytest -m "not matrix" $(TESTS)

test-mpi: $(STAMP) ## run the tests of NumPy over MPI, by mpiexec on NPROC processes
	@$(BIN)/mpiexec -n $(NPROC) $(BIN)/python tests/mpi/under_mpiexec.py $(TESTS)

matrix: $(STAMP) ## run the long forms of the tests: every cell of every table
	@$(BIN)/python -m pytest -m matrix --timeout 3600 $(TESTS)

check: $(STAMP) ## lint, format, types, the import contract and the layout of the tree
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m pytest tests/test_layout.py

bench: $(BENCH_STAMP) ## measure beside the rivals on an idle machine, half an hour; tables in benchmarks/results/
	@for script in benchmarks/*.py; do echo "$$script"; $(BIN)/python "$$script" $(if $(QUICK),--quick --results build/bench); done

clean: ## remove caches, builds and .venv; runs/ is yours and stays
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -path ./runs -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" > /dev/null || { echo "There is no $(PYTHON). Install Python 3.11, or name yours: PYTHON=python3.11 make" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' || \
	    { echo "$$("$(PYTHON)" --version) is not supported. Use 3.10 to 3.13 (3.11 is tested): PYTHON=python3.11 make" >&2; exit 1; }
	@echo "Installing into $(VENV): minutes the first time, as torch is large."
	@$(BIN)/python -c '' 2> /dev/null || "$(PYTHON)" -m venv --clear $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[torch,monitor,data,mpi,deepspeed,test,check]"
	@touch $(STAMP)

$(BENCH_STAMP): $(STAMP)
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[bench]"
	@touch $(BENCH_STAMP)
