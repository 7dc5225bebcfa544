# Two commands for a newcomer: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Spinning threads stall each other when cores are few (README, "On few cores").
export GOMP_SPINCOUNT ?= 0
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart install test test-fast lint clean

quickstart: $(VENV)/.installed  ## environment, install, a real RL run on the embedded lab, before/after grid
	$(BIN)/python scripts/train.py --config assets/recipes/quickstart.yaml run.dir=runs/quickstart
	@echo
	@echo "Open runs/quickstart/report.html; the before/after grid is runs/quickstart/samples/before_after.png"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[test,lint,offline]"
	@touch $@

test: $(VENV)/.installed-test  ## every test but the nightly ones
	$(BIN)/python -m pytest -q -m "not nightly"

test-fast: $(VENV)/.installed-test
	$(BIN)/python -m pytest -x -q -m "not slow and not nightly"

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
