# Two commands do all the set-up: `make run` and `make test`. Both are safe to repeat.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
  $$p -c '$(SUPPORTED)' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# spinning OpenMP threads cost 5x when two processes share the cores
export OMP_WAIT_POLICY := PASSIVE
# no stage needs the network: data sets and models are local unless params.yaml names a hub
export HF_HUB_DISABLE_TELEMETRY := 1
export PATH := $(BIN):$(PATH)

.PHONY: run test quick check env fix deps docs dist gpu-bench gpu-check page-check clean help

run: env  ## the whole pipeline on params.yaml, to report/index.html
	dvc repro
	@echo "report: $(CURDIR)/report/index.html"

test: env  ## the whole test suite, formatter, linter, types and import contracts included
	pytest -n 2 --dist loadfile

quick: env  ## every stage on the smoke preset, in quick/, within two minutes
	rm -rf quick
	lkcache init quick --preset smoke
	cd quick && dvc repro
	@echo "report: $(CURDIR)/quick/report/index.html"

check: env  ## the same checks as `make test`, cheapest first, stopping at the first failure
	ruff format --check .
	ruff check .
	mypy
	lint-imports
	pytest -x -n 2 --dist loadfile

fix: env  ## let the formatter and the linter mend what they can
	ruff format .
	ruff check --fix .

env: $(VENV)/.installed  ## the virtual environment with pinned packages

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(SUPPORTED)' || { echo "no Python 3.11 or 3.12 among" \
	  "python3, python3.12, python3.11; install one or set PYTHON=/path/to/python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  "torch==2.13.0" --editable ".[pipeline,fast,s3,dev]"
	@touch $@

deps: env  ## write every stage's import closure into dvc.yaml, and docs/reference/
	python -m tests.house.closure
	python -m tests.house.reference

docs: env  ## the pages under docs/ as a site, to site/index.html; warnings are errors
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict

dist: env  ## wheel and sdist, to dist/; the version is the tag's
	python -m pip wheel --quiet --no-deps --wheel-dir dist .
	python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"

# needs torch, triton, transformers and pydantic alone: any environment of a GPU box has them
gpu-bench:  ## terms, fused head and an EAGLE-3 step on this machine's GPU, to benchmarks/*-gpu.md
	python benchmarks/terms.py --device cuda
	python -m benchmarks.eagle --device cuda

gpu-check: env  ## every stage on this machine's GPU with an 8 B-shaped random target, to benchmarks/gpu-check.md
	python -m benchmarks.gpu_check

page-check: env  ## our pages in headless Chromium with axe-core (asks for Node 20 and Chromium)
	cd tests/browser && npm install --no-package-lock --no-audit --no-fund
	pytest -n 0 tests/browser

clean:  ## remove what stages left unfinished; outputs and DVC's cache stay
	rm -rf .scratch quick

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'
