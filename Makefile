# One command each. Needs Python 3.11 or later, nothing else.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Tests start many processes: where Python is told to keep no bytecode, each would compile the package again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help env train test test-distributed lint check format docs clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

env: $(VENV)/.ready ## create the environment

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	# Its build asks torch, which is there now, for operations to compile: none, the tests use PyTorch's own.
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed
	touch $@

train: env ## fine-tune the built-in tiny model on the shipped rows, on a CPU, in under three minutes
	$(BIN)/stoker train examples/quickstart.yaml --overwrite

test: env ## run every test
	# Tests of several processes wait long and come first: an idle worker takes over what another has not begun.
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-distributed: env ## run every test of several processes, on two and on four of them
	STOKER_TEST_ALL=1 $(BIN)/python -m pytest -n 0 tests/distributed

lint: env ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports

check: lint ## format, lint, types, layers, quick tests: about a minute
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow' tests/unit

format: env ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: env ## regenerate the pages that come from code
	$(BIN)/python -m docs.generate

clean: ## remove the environment
	rm -rf $(VENV)
