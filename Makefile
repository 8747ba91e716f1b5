# `make train` and `make test` start from nothing but Python >= 3.10, a C++ compiler and make. All else goes into .venv.
PYTHON ?= python3
CONFIG ?= configs/digits.yaml
WORKERS ?= 2
KILLS ?= 200
SEED ?= 0

VENV := .venv
# pip compiles on one core. (The files of some packages are for other Pythons and do not compile.)
INSTALL := $(VENV)/bin/python -m pip --disable-pip-version-check install --no-compile
COMPILE := $(VENV)/bin/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
# As after `. .venv/bin/activate`: another active environment must not be taken for this one.
ACTIVE := VIRTUAL_ENV="$(CURDIR)/$(VENV)" PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
# Tests that start workers of their own wait a good deal: two files at a time, on any number of cores. The others have
# one process a core.
# (Exit code 5 of pytest: ARGS leaves no test.)
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

fuzz: $(VENV)/.test ## draw 10,000 configs and command lines; ARGS="--hypothesis-seed=1" draws others
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

clean: ## remove .venv and every cache of the tools; runs/ and the Horovod wheel stay
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/pip:
	@command -v $(PYTHON) >/dev/null || \
		{ echo "error: there is no $(PYTHON): install Python >= 3.10, or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("error: $(PYTHON) is Python %d.%d, and 3.10 or later is needed: make PYTHON=/path/to/python" % sys.version_info[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) cannot make virtual environments (Debian: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# An empty file stands for each thing installed, so that a second make starts at once.
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
