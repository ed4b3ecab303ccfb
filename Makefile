# Two commands do everything on a fresh machine:
#   make quickstart   set up, warm start and GRPO on the shapes world, report
#   make test         set up, lint, types, tests
# Both share one virtual environment in .venv.

PYTHON ?= python3
BIN := .venv/bin
SEED ?= 0

.PHONY: install quickstart test lint clean

install: .venv/.installed

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

quickstart: install
	$(BIN)/python -m underdrawing.quickstart --seed $(SEED)

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
