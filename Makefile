# make run   the page and the API with the bundled model        make test   the whole test suite
# make check  ruff and mypy                                      make bench  figures of this machine
# make test-gpu PYTHON=python3   the tests that need a GPU

PYTHON ?= python3
# Processes that share the tests, a file at a time; each computes with one thread.
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run install test test-gpu check bench docs clean

run: $(VENV)/.run
	$(BIN)/python app.py $(MODEL)

test: $(VENV)/.dev
	$(BIN)/python -m tests.browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder tests

# On a machine with an NVIDIA GPU; uses PYTHON as it is, and installs nothing.
test-gpu:
	$(PYTHON) -m pytest $$($(PYTHON) -c "import xdist" 2>/dev/null && printf '%s' '-n 8') tests/gpu tests/ops

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python -m tests.bench.foundation

$(VENV)/.run: requirements.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "LMDesk needs Python 3.11 to 3.13; say for example: make run PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# The command lmdesk, in place of python app.py, from any folder.
install: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .

docs: $(VENV)/.run
	$(BIN)/python -m backend.workspace.keys
	$(BIN)/python -m backend.reference_docs
	$(BIN)/python -c "import app, backend.command_docs as docs; docs.write(app.make_parser())"

clean:
	rm -rf $(VENV)
