# make demo   trains and compares two small ensembles on the sample that comes along
# make test   runs all tests
# Everything lives in .venv/ here; nothing outside this folder is changed.

PYTHON ?= python3
RANKS ?= 2
JOBS ?= 2
ARGS ?=
DATA ?= configs/samples/xtb_tiny.h5

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
HPCMLIP := $(BIN)/python -m hpcmlip
# a file of tests stays together, for what its tests share; the slow ones come first (tests/conftest.py)
PYTEST := $(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=loadfile --no-loadscope-reorder

# mpirun and torchrun come as wheels
export PATH := $(CURDIR)/$(BIN):$(PATH)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test soak bench lint lock clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile
	echo "  Variables: PYTHON=$(PYTHON)  RANKS=$(RANKS) (processes a member)  JOBS=$(JOBS) (tests at a time; 0 shows their prints)  ARGS= (for pytest)"

# --------------------------------------------------------------------------------------------------- environment

$(VENV)/created:
	@command -v $(PYTHON) > /dev/null || { echo "make: there is no '$(PYTHON)'; name a Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
	  echo "make: hpcmlip needs Python 3.11 or newer, '$(PYTHON)' is $$($(PYTHON) -V); name another: make PYTHON=/path/to/python3.11"
	  exit 1
	}
	$(PYTHON) -m venv --clear $(VENV) || { echo "make: $(PYTHON) cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	touch $@

$(VENV)/installed: $(VENV)/created pyproject.toml constraints.txt
	@echo "make: installing the pinned packages into $(VENV)/ (a minute or two)"
	$(PIP) install --upgrade --constraint constraints.txt pip setuptools
# torch by itself first: whichever build of it pip is led to (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS), the rest then keeps
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --editable .
	touch $@

$(VENV)/tested: $(VENV)/installed
	@$(PIP) install --constraint constraints.txt --editable ".[test]"
	touch $@

# ---------------------------------------------------------------------------------------------------------- demo

demo: $(VENV)/installed ## shard the sample, train a single- and a multi-fidelity ensemble, compare them
	@echo "make demo: 1 of 4, raw file -> store"
	$(HPCMLIP) shard configs/data/ab_initio_small.yaml out=demo/ab_initio.zarr
	echo "make demo: 2 of 4, ensemble of two on the CCSD(T) energies alone"
	$(HPCMLIP) submit configs/demo_sf.yaml --members 2 --local --ranks $(RANKS) --evaluate demo/ab_initio.zarr --run-dir demo/sf
	echo "make demo: 3 of 4, ensemble of two that also sees the wB97X energies and forces"
	$(HPCMLIP) submit configs/demo_mf.yaml --members 2 --local --ranks $(RANKS) --evaluate demo/ab_initio.zarr --run-dir demo/mf
	echo "make demo: 4 of 4, comparison"
	$(BIN)/python -m hpcmlip.evaluation.comparison demo/sf/evaluation demo/mf/evaluation --level cc

# ---------------------------------------------------------------------------------------------------------- work

test: $(VENV)/tested ## all tests; ARGS="-k loader" for some of them
	@PATH="$$PATH:/usr/sbin:/sbin" command -v slurmctld > /dev/null || echo "make test: Slurm is not installed (Debian, Ubuntu: apt install slurm-wlm), the tests that start it are left out and listed at the end"
	$(PYTEST) $(ARGS)

soak: $(VENV)/tested ## every fault of docs/reliability.md at full counts, hours; stop it and start it again as you like
	@$(PYTEST) --soak=soak/record.jsonl $(ARGS) && code=0 || code=$$?
	$(BIN)/python tests/soak.py soak/record.jsonl docs/reliability.md
	exit $$code

.peers/mace/ready:
	@$(PYTHON) -m venv --clear .peers/mace
	.peers/mace/bin/python -m pip install -qq --constraint constraints.txt torch
	.peers/mace/bin/python -m pip install -qq "mace-torch==0.3.16"
	touch $@

bench: $(VENV)/tested .peers/mace/ready ## all benchmarks -> docs/benchmarks.md, two hours on a quiet machine; DATA=xtb_nms.h5
	@test -f "$(DATA)" || { echo "make bench: name the raw file of configs/data/xtb_nms.yaml, DATA=/path/to/xtb_nms.h5"; exit 1; }
	$(PIP) install --constraint constraints.txt --editable ".[bench]"
	$(HPCMLIP) shard configs/data/ab_initio_small.yaml out=demo/ab_initio.zarr
	$(HPCMLIP) bench page $(ARGS) --data "$(DATA)" --mace .peers/mace/bin/python

lint: $(VENV)/tested ## ruff
	@$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

lock: ## newest versions that pyproject.toml allows -> constraints.txt; run the tests afterwards
	@fresh=$$(mktemp -d)
	trap 'rm -rf "$$fresh"' EXIT
	$(PYTHON) -m venv "$$fresh"
	"$$fresh/bin/python" -m pip install --quiet torch
	"$$fresh/bin/python" -m pip install --quiet --editable ".[test,bench,slurm]"
	{
	  sed -n '/^#/p' constraints.txt
	  "$$fresh/bin/python" -m pip freeze --all --exclude-editable | sed -e '/^pip==/d' -e 's/+.*//'
	} > "$$fresh/constraints.txt"
	cp "$$fresh/constraints.txt" constraints.txt

clean: ## remove the environment, the demo and all caches
	@rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
