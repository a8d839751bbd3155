# The two commands are `make demo` and `make test`. Both make .venv and install what is pinned.
PYTHON ?= python3
PY = .venv/bin/python

.PHONY: demo test test-all clean

demo: .venv/runs        # the whole pipeline on text it makes itself, a few minutes on two CPU cores
	$(PY) demo.py

test: .venv/tests       # no network, no GPU, a few minutes on two CPU cores
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses=4 -m "not thorough" tests

test-all: .venv/tests   # the whole of what `make test` samples: kills, failing saves, fuzzed settings
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses=4 tests

.venv/runs: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/tests: .venv/runs tests/requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

clean:                  # not data/ and out/: they are yours
	rm -rf .venv demo .pytest_cache
