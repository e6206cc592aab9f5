# make run [CONFIG=configs/X.yaml] [SET="key=value ..."]   all stages and the result table
# make test                                               lint, format check, all tests
# make cov                                                the tests with line coverage
# make results [CONFIG=...]                               make run, then its tables and figures into results/<name>/
# make bench                                              speed and memory against plain peers into results/bench-<device>.*
PYTHON ?= python3
CONFIG ?= configs/digits.yaml
SET ?=
NAME := $(basename $(notdir $(CONFIG)))
PY := .venv/bin/python

.PHONY: run test cov results bench clean

run: .venv/installed
	$(PY) reproduce.py --config $(CONFIG) $(SET)

test: .venv/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest

results: run
	mkdir -p results/$(NAME)
	cd runs/$(NAME)/report && cp table.md table.tex table.csv runs.csv summary.json figures/differences.png figures/curves.png ../../../results/$(NAME)/

bench: .venv/installed
	$(PY) -m benchmarks --out auto

cov: .venv/installed-dev
	$(PY) -m pytest --cov --cov-report=term-missing:skip-covered

.venv/installed: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("Python 3.11 to 3.13 is needed, for example: make run PYTHON=python3.12")'
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache
