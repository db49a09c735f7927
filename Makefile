# VENV=/elsewhere chooses where the Python environment is made, PYTHON=/path/to/python with what;
# TESTS_AT_ONCE=N how many tests run at the same time: some of them are four processes.

VENV ?= .venv
TESTS_AT_ONCE ?= 2
BIN := $(abspath $(VENV))/bin

# This checkout's code is what runs, even where several checkouts share one environment.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
export PYTHON

.PHONY: help env quickstart test lint bench

help:  ## Show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 20

env:  ## Make the Python environment, unless it is there and fits setup.py
	@tools/environment.sh make "$(VENV)"

quickstart: env  ## Train a small hybrid model on this computer, plot it: about ten minutes
	@PATH="$(BIN):$$PATH" examples/01_quickstart/run.sh

# Tests start many processes: what they import is compiled once, whatever the environment says.
test: env  ## Run the whole test suite
	@PYTHONDONTWRITEBYTECODE= "$(BIN)/python" -m pytest -n $(TESTS_AT_ONCE)

lint: env  ## Check style and types
	@"$(BIN)/python" -m ruff check .
	@"$(BIN)/python" -m ruff format --check .
	@"$(BIN)/python" -m mypy

bench: env  ## Compare a training step with a peer's on this computer
	@"$(BIN)/python" benchmarks/train_step.py
