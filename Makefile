# `make help` lists the targets. Needs GNU make, bash and Python 3.10 or newer with its venv module.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
VENV ?= .venv
CONFIG := configs/quickstart.yaml
DATA :=
# A run belongs to its images: DATA=photos/cats goes to runs/quickstart_cats.
OUTPUT := runs/$(basename $(notdir $(CONFIG)))$(if $(DATA),_$(notdir $(patsubst %/,%,$(DATA))))
ARGS :=

PY := $(VENV)/bin/python
PIP_OPTIONS := --disable-pip-version-check --no-input -q -q
PIP := $(PY) -m pip $(PIP_OPTIONS)
# Two test processes; one thread each, or they would compete for the cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST := $(ONE_THREAD) $(PY) -m pytest -q

# An empty file marks that these very requirements are installed; other contents, other name.
RUN_STAMP := $(VENV)/.dinov2_equi-run-$(shell cksum < requirements.txt | tr ' ' '-')
DEV_STAMP := $(VENV)/.dinov2_equi-dev-$(shell cat requirements.txt requirements-dev.txt | cksum | tr ' ' '-')

# mmsegmentation has an environment of its own, which sees the packages of $(VENV) and changes none of them.
MMSEG_VENV := $(VENV)-mmseg
MMSEG_REQUIREMENTS := eval/segmentation/requirements.txt
MMSEG_PY := $(MMSEG_VENV)/bin/python
MMSEG_STAMP := $(MMSEG_VENV)/.dinov2_equi-mmseg-$(shell echo $(abspath $(VENV)) | cat - $(MMSEG_REQUIREMENTS) | cksum | tr ' ' '-')

.PHONY: help
help:
	@echo "make train     train the small model of configs/quickstart.yaml; the result is in runs/quickstart"
	@echo "               DATA=folder       your own images"
	@echo "               CONFIG=file       another configuration; OUTPUT=folder  another place for the run"
	@echo "               ARGS=\"key=value\"  other settings, for example ARGS=\"optim.epochs=2 train.seed=1\""
	@echo "make test      all checks: style, types, imports, tests on the CPU; with REQUIRE_SLURM=1 also those of SLURM jobs"
	@echo "make test-mmseg the tests of eval/segmentation on mmsegmentation alone"
	@echo "make test-slow the slow tests;  make test-gpu  the tests that need a CUDA device"
	@echo "make test-slurm the tests of SLURM jobs alone, which need a running SLURM"
	@echo "make bench     speed and memory against plain references; the numbers go to runs/bench"
	@echo "make lint      style and imports only;  make types  types only"
	@echo "make format    rewrite the code in the project's style"
	@echo "make clean     remove caches; keeps $(VENV) and runs"
	@echo
	@echo "The first call sets up a Python environment in $(VENV): about two minutes and 5 GB."

# ---------------------------------------------------------------------------------------------------------- environment

$(RUN_STAMP):
	@$(PY) -m pip --version > /dev/null 2>&1 || $(MAKE) --no-print-directory venv
	@echo "Installing the packages of requirements.txt into $(VENV): about two minutes and 5 GB, only this once."
	@$(PIP) install -r requirements.txt
	@rm -f $(VENV)/.dinov2_equi-run-* && touch $@

$(DEV_STAMP): $(RUN_STAMP)
	@echo "Installing the packages of requirements-dev.txt into $(VENV)."
	@$(PIP) install -r requirements.txt -r requirements-dev.txt
	@rm -f $(VENV)/.dinov2_equi-dev-* && touch $@

# Without opencv-python, which needs libGL: its headless kind is in $(VENV).
$(MMSEG_STAMP): $(DEV_STAMP)
	@echo "Installing the packages of $(MMSEG_REQUIREMENTS) into $(MMSEG_VENV): seconds and 100 MB."
	@$(PY) -m venv --clear $(MMSEG_VENV)
	@$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$($(MMSEG_PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
	@$(MMSEG_PY) -m pip $(PIP_OPTIONS) install -r $(MMSEG_REQUIREMENTS)
	@$(MMSEG_PY) -m pip $(PIP_OPTIONS) uninstall -y opencv-python
	@touch $@

NAME_A_PYTHON := make PYTHON=/path/to/python3

.PHONY: venv
venv:
	@command -v "$(PYTHON)" > /dev/null || { \
	  echo "Error: '$(PYTHON)' was not found. Install Python 3.10 or newer, or name one: $(NAME_A_PYTHON)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Error: '$(PYTHON)' is older than Python 3.10. Name a newer one: $(NAME_A_PYTHON)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2> /dev/null || { \
	  version=$$("$(PYTHON)" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	  echo "Error: Python lacks its venv module. Run as root: apt-get install python$$version-venv" >&2; exit 1; }
	@echo "Creating a Python environment in $(VENV)."
	@{ "$(PYTHON)" -m venv "$(VENV)" && $(PY) -m pip --version > /dev/null; } || { \
	  echo "Error: the environment in $(VENV) could not be made. Delete that folder and run make again." >&2; exit 1; }

# ------------------------------------------------------------------------------------------------------------- training

.PHONY: train
train: export DATA := $(DATA)
train: $(RUN_STAMP)
	@echo "Training with $(CONFIG). The run is written to $(OUTPUT). The command:"
	@set -- $(PY) dinov2_equi/run/train.py --config-file "$(CONFIG)" --output-dir "$(OUTPUT)" \
	  $(if $(DATA),"train.dataset_path=$$DATA") $(ARGS); printf '%q ' "$$@"; echo; "$$@"

# --------------------------------------------------------------------------------------------------------------- checks

.PHONY: test
# Jobs are submitted only where somebody asked for it: the cluster that answers may be one on which others wait.
test: style types imports pytest test-mmseg $(if $(REQUIRE_SLURM),test-slurm)
	@echo "All checks passed."

.PHONY: lint
lint: style imports

.PHONY: style
style: $(DEV_STAMP)
	@echo "== Style (ruff)"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

.PHONY: types
types: $(DEV_STAMP)
	@echo "== Types (mypy)"
	@$(PY) -m mypy

.PHONY: imports
imports: $(DEV_STAMP)
	@echo "== Imports (import-linter)"
	@$(VENV)/bin/lint-imports --no-logo

.PHONY: pytest
pytest: $(DEV_STAMP)
	@echo "== Tests (pytest)"
	@$(PYTEST) -n 2 -m "not gpu and not slow and not slurm"

.PHONY: test-mmseg
test-mmseg: $(MMSEG_STAMP)
	@echo "== Tests on mmsegmentation (pytest)"
	@$(ONE_THREAD) $(MMSEG_PY) -m pytest -q tests/integration/test_eval_segmentation_mmseg.py

.PHONY: test-slow
test-slow: $(DEV_STAMP)
	@$(PYTEST) -m "slow and not gpu and not slurm"

.PHONY: test-gpu
test-gpu: $(DEV_STAMP)
	@$(PYTEST) -m gpu

.PHONY: test-slurm
test-slurm: $(DEV_STAMP)
	@echo "== Jobs of SLURM (pytest; skipped where none answers: docs/slurm.md)"
	@$(PYTEST) -m slurm tests/integration/test_slurm.py

.PHONY: bench
bench: $(RUN_STAMP)
	@for name in views loader evaluation train_step; do \
	  echo "== benchmarks/$$name.py"; OMP_NUM_THREADS=1 $(PY) benchmarks/$$name.py --output runs/bench/$$name.json; done

.PHONY: format
format: $(DEV_STAMP)
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

.PHONY: clean
clean:
	@rm -rf build dist *.egg-info .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find . -path ./.git -prune -o -path "./$(VENV)" -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
	@echo "Caches removed. $(VENV) and runs are untouched."
