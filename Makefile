# make train: from a fresh clone to a trained, explained run.   make lab: JupyterLab.
# make world: the same on made scenes, where a model can be seen to generalise.
# make test: style, library notebooks, tests (minutes).   make test-ci: run notebooks, processes.   make test-all: the long matrix.
# make gpu: what only a GPU can answer, into runs/gpu/gpu.json (minutes; on a CPU the same at tiny size).
# make export: the library and its public faces from the notebooks.   make parameters: the run notebooks' parameters cells.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
# A CPU-only machine saves gigabytes with: make train TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
export PYTHONUNBUFFERED := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup train world gpu export parameters test test-ci test-all lab clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(BIN)/pip install -q -c constraints.txt torch --index-url $(TORCH_INDEX))
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

train: setup
	$(BIN)/papermill nbs/train.ipynb runs/train.ipynb -p logit_scale_init 4.6052 --stdout-file - --no-progress-bar

gpu: setup
	$(BIN)/python -m fgclip_nb.bench --gpu runs/gpu

world: setup
	$(BIN)/papermill nbs/train.ipynb runs/world.ipynb -p data world -p augment none -p batch_size 32 -p max_regions 4 \
	  -p learning_rate 1.0e-3 -p lr_warmup_steps 50 -p hard_weight 1.0 -p memory_bank_size 256 -p max_steps 1000 \
	  -p eval_every 200 -p best_by rank --log-output

test: setup
	$(BIN)/python tests/check.py

test-ci: setup
	$(BIN)/python tests/check.py ci

test-all: setup
	$(BIN)/python tests/check.py all

export: setup
	$(BIN)/nbdev_export
	$(BIN)/python tests/faces.py

parameters: setup
	$(BIN)/python tests/parameters.py

lab: setup
	$(BIN)/jupyter lab --notebook-dir .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
