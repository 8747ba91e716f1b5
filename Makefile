# `make train` and `make test` need only Python >= 3.10, a C++ compiler and make. Everything else is installed into .venv.
PYTHON ?= python3
CONFIG ?= configs/digits.yaml
WORKERS ?= 2
KILLS ?= 200
SEED ?= 0

VENV := .venv
# Compiled after the installation, since pip compiles on one core only. (Some packages contain files for other versions of
# Python, which do not compile.)
INSTALL := $(VENV)/bin/python -m pip --disable-pip-version-check install --no-compile
COMPILE := $(VENV)/bin/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
# As after `. .venv/bin/activate`, so that another active environment is not used.
ACTIVE := VIRTUAL_ENV="$(CURDIR)/$(VENV)" PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
# Tests that start workers spend much time waiting: they run two files at a time, on any number of cores. The others use
# one process per core.
# (Exit code 5 of pytest: ARGS selects no test.)
PROCESSES := distributed or slurm or netns or gpu
NONE_CHOSEN := [ $$? = 5 ]
SCRIPTS = $(wildcard launch/*.sh slurm/*.sh slurm/*.sbatch) .ci/run

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test fuzz faults lint types shellcheck format clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1 /p' Makefile | while read -r name text; do printf '  make %-11s %s\n' "$$name" "$$text"; done

train: $(VENV)/.train ## train CONFIG (configs/digits.yaml) with WORKERS (2); ARGS="optimizer.lr=0.1 ..." overrides settings
	$(ACTIVE) launch/local.sh $(CONFIG) -n $(WORKERS) $(ARGS)

test: ## build Horovod, check everything, run the tests; ARGS="-k name ..." goes to pytest
	@$(MAKE) --jobs=2 $(VENV)/.horovod lint types shellcheck
	$(ACTIVE) OMP_NUM_THREADS=1 python -m pytest -m "not ($(PROCESSES))" --numprocesses auto $(ARGS) || $(NONE_CHOSEN)
	$(ACTIVE) python -m pytest -m "$(PROCESSES)" --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS) || $(NONE_CHOSEN)

fuzz: $(VENV)/.test ## test 10,000 random configs and command lines; ARGS="--hypothesis-seed=1" chooses others
	$(ACTIVE) FUZZ_EXAMPLES=2500 OMP_NUM_THREADS=1 python -m pytest tests/unit/training/config/test_any_config.py --numprocesses auto $(ARGS)

faults: $(VENV)/.horovod ## kill runs at KILLS (200) random moments chosen by SEED (0), and resume them
	$(ACTIVE) python -m tests.faults.kills --kills $(KILLS) --seed $(SEED) $(ARGS)

lint: $(VENV)/.test ## ruff: errors, style, formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.test ## mypy, strict
	$(VENV)/bin/mypy

shellcheck: $(VENV)/.test ## the scripts
	$(VENV)/bin/shellcheck $(SCRIPTS)

format: $(VENV)/.test ## format the code, fix what ruff can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## remove .venv and all caches of the tools; keep runs/ and the Horovod wheel
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/pip:
	@command -v $(PYTHON) >/dev/null || \
		{ echo "error: $(PYTHON) is not installed: install Python >= 3.10, or choose one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("error: $(PYTHON) is Python %d.%d, but 3.10 or newer is required: make PYTHON=/path/to/python" % sys.version_info[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) cannot create virtual environments (Debian: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# An empty file marks each installation, so that the next make does not repeat it.
$(VENV)/.train: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(INSTALL) --constraint constraints.txt --editable .
	$(COMPILE)
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(INSTALL) --constraint constraints.txt --editable '.[mpi,dev]'
	$(COMPILE)
	@touch $@ $(VENV)/.train

$(VENV)/.horovod: launch/install-horovod.sh $(VENV)/.test
	launch/install-horovod.sh --python $(VENV)/bin/python
	@touch $@
