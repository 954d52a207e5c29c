# `make check` before every commit, `make test` on every save, `make all` before a release.
python ?= .venv/bin/python

.PHONY: install check format test slow all gpu

install:  ## a virtual environment with everything that the tests need
	python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[test]'

check:  ## style, types and the laws of the house
	$(python) -m ruff check . && $(python) -m ruff format --check minirl tests
	$(python) -m mypy && $(python) -m pytest tests/test_house.py

format:
	$(python) -m ruff check --fix . && $(python) -m ruff format minirl tests

test:  ## the fast tier: about two minutes on two cores
	$(python) -m pytest -m "not slow"

slow:  ## whole runs, kills, recipes, the embedded model: about ten minutes
	$(python) -m pytest -m slow

all: check
	$(python) -m pytest

gpu:  ## on a machine with a GPU: the cuda tests, then the bench; JSON into gpu_results/
	.ci/gpu
