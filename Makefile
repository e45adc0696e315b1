# Needs Python >= 3.11 and make. Everything is installed into .venv, and nothing outside this folder is changed.
PYTHON ?= python3
BIN := .venv/bin
unexport PYTHONDONTWRITEBYTECODE  # without it every process compiles what it imports: half a minute each

.PHONY: help demo compare test test-fast lint bench bundle deploy-check clean

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed; name one with: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[dev]'
	@touch $@

demo: .venv/.installed ## Train the default federation, write results/demo, print the final table
	$(BIN)/cafe-flwr run . --run-config 'name="demo"' --results-dir results

compare: .venv/.installed ## The short comparison of methods; writes its table into README.md (about 8 minutes)
	$(BIN)/cafe-flwr compare experiments/quick.yaml --results-dir results --update-markdown README.md

test: lint ## Lint, types and all tests, three files at a time: real nodes and servers first, which wait a lot
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-fast: .venv/.installed ## The quick tests of every part, without processes: about 100 seconds on two cores
	$(BIN)/python -m pytest -m "not flower and not slow" -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/.installed ## Lint and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m cafe_flwr.app.manifest --check
	$(BIN)/python scripts/limits.py

bench: .venv/.installed ## Every benchmark in turn (the better part of an hour)
	$(BIN)/python -m benchmarks

bundle: .venv/.installed ## Bundle the app for deployment into dist/
	$(BIN)/python scripts/bundle.py

deploy-check: .venv/.installed ## SuperLink and SuperNodes on loopback, killed and resumed: what is promised and what happens (some minutes)
	$(BIN)/python -m deploy check

clean: ## Remove the environment and caches; results stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
