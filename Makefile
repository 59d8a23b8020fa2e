# make run    sets up .venv and pretrains the demo model
# make test   sets up .venv, lints, type-checks and tests
# make test-cluster   as root, on Debian: installs Slurm, and tests on a Slurm and a Ray of two hosts each
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

CLIENT := .venv-client

.PHONY: setup run test test-cluster lint bench clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), "distlm needs Python 3.11 to 3.13"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e '.[train,kubernetes,dev]'
	touch $@

run: setup
	$(BIN)/distlm submit configs/pretrain.yaml

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes, each with a file at a time, in the order of the files: the quick ones are the last. Each test starts
# many processes, which are to find their modules compiled.
test: lint
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

# One after the other: each uses the whole machine.
test-cluster: setup $(CLIENT)/.installed
	SLURM_LAB_INSTALL=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest tests/cluster

# What a machine has that only sends runs to a Ray cluster.
$(CLIENT)/.installed: pyproject.toml
	test -x $(CLIENT)/bin/python || $(PYTHON) -m venv $(CLIENT)
	$(CLIENT)/bin/pip install --quiet -e '.[ray]'
	touch $@

bench: setup
	$(BIN)/python benchmarks/control_plane.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/data_order.py
	$(BIN)/python benchmarks/tokenization.py
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/recovery.py
	$(BIN)/python benchmarks/threads.py
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/finetune.py
	$(BIN)/python benchmarks/finetune.py --memory

clean:
	rm -rf $(VENV) $(CLIENT) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
