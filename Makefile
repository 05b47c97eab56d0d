# Two commands are enough on a fresh machine: `make demo`, `make test`. Both install first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# False too where the first run was cut off while it made the environment.
HAS_PIP := $(BIN)/python -m pip --version >/dev/null 2>&1
HEADER := import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))

.PHONY: install demo demo-smollm2 test test-slow lint bench clean

install: $(STAMP)

# The tested versions stand in constraints.txt; torch comes first, as its build decides what the
# others find. The package is installed in place, so an edited file counts at once.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@command -v g++ >/dev/null || { echo "g++ is missing: install a C++20 compiler (Debian: apt-get install g++)"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo "Python 3.11 to 3.13 is needed; name one: make PYTHON=python3.11"; exit 2; }
	@$(HAS_PIP) || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv module is missing: install it (Debian: apt-get install python3-venv)"; exit 2; }
	$(HAS_PIP) || { $(PYTHON) -m venv $(VENV) && $(HAS_PIP); } || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -c '$(HEADER)' || { echo "Python.h is missing: install Python's headers (Debian: apt-get install python3-dev)"; exit 2; }
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/rmr1 demo

demo-smollm2: $(STAMP)
	$(BIN)/rmr1 demo recipes/demo-smollm2.toml

# A process for each core, at most four, of one thread each: tests are small, and there are many.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

# One after the other: some measure the memory of a process, and a worker's peak would be theirs.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check rmr1 tests benchmarks recipes setup.py
	$(BIN)/ruff format --check rmr1 tests benchmarks recipes setup.py
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/rmr1 bench

clean:
	rm -rf build dist *.egg-info rmr1/_C*.so $(STAMP)
