# The two commands are `make demo` and `make test`. Both make .venv and install what constraints.txt pins.
PYTHON ?= python3
PY = .venv/bin/python
PIP = $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses=4 --dist=worksteal

.PHONY: demo test quick test-all lint clean

demo: .venv/runs        # the whole pipeline on text it makes itself, a few minutes on two CPU cores
	$(PY) -m tools.demo

test: .venv/tests       # no network, no GPU, a few minutes on two CPU cores
	$(PYTEST) -m "not thorough" tests

quick: .venv/tests      # under half a minute, after a change of model, loss or loop
	$(PYTEST) -m "not slow and not thorough" $(addprefix tests/test_,model.py loss.py train.py distill.py)

test-all: .venv/tests   # the whole of what `make test` samples: kills, failing saves, fuzzed settings
	$(PYTEST) tests

lint: .venv/tests       # line length, unused names, import order
	.venv/bin/ruff check

.venv/runs: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

.venv/tests: .venv/runs tests/requirements.txt
	$(PIP) -r tests/requirements.txt
	touch $@

clean:                  # not data/ and out/: they are yours
	rm -rf .venv demo .pytest_cache .ruff_cache
