# The two commands of the README, from a clean clone with Python 3.11 or newer and a C++ compiler.
#
#   make demo             train a small model on text that this machine has, and write a page about it
#   make test             everything that has to hold: lint, format, types, tests
#   make test-gpu         the same of training on a GPU, on a machine that has one
#
# PYTHON=python3.12 chooses an interpreter; pip reads its own configuration and PIP_* variables as ever.
# Where PyTorch's default build is the one for GPUs and none is wanted, point pip at PyTorch's index of CPU builds.

SHELL := /bin/bash
ifndef PYTHON
PYTHON := $(shell for name in python3.13 python3.12 python3.11 python3.14 python3; do \
	command -v $$name >/dev/null && $$name -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$name && break; done)
endif
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo

# pip would compile 13,000 modules one after the other; here all cores do. A few are templates, and no Python.
COMPILE = $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib src || true

.PHONY: help demo test test-gpu lint format types clean

help:
	@sed -n 's/^#   //p' Makefile

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: needs Python 3.11 or newer with venv (on Debian: python3-venv); or say PYTHON=…" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "installing tozan and what it needs into $(VENV)"
	$(BIN)/python -m pip install --quiet --no-compile --editable .
	@$(COMPILE)
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	@echo "installing tozan and what its tests need into $(VENV)"
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[test]'
	@$(COMPILE)
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/tozan demo --out $(DEMO) $(ARGS)

test: lint types
	$(BIN)/python -m pytest $(ARGS)

test-gpu: $(VENV)/.installed-test
	TOZAN_GPU_TESTS=1 $(BIN)/python -m pytest tests/train/gpu $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build
