# Two commands do everything on a fresh machine:
#   make quickstart   set up, warm start and GRPO on the shapes world, report
#   make test         set up, lint, types, tests
# Both share one virtual environment in .venv, which holds exactly what requirements.lock names.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SEED ?= 0
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: install install-newest quickstart test test-newest lint lock clean

install: $(VENV)/.installed

# The lock's own markers leave out machines that it does not fit, so that nothing would be installed and nothing said.
$(VENV)/.installed: pyproject.toml requirements.lock requirements-build.lock
	@$(PYTHON) -c "import platform, sys; \
	here = 'Python %d.%d on %s %s' % (*sys.version_info[:2], platform.system(), platform.machine()); \
	fits = (3, 11) <= sys.version_info[:2] < (3, 14) and here.endswith('Linux x86_64'); \
	sys.exit(None if fits else 'requirements.lock fits Python 3.11 to 3.13 on Linux x86_64, and this is ' + here + \
	'; name another interpreter (make $(MAKECMDGOALS) PYTHON=python3.12), or do without the lock (make install-newest)')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --require-hashes -r requirements-build.lock
	$(PIP) install --quiet --require-hashes --no-build-isolation -r requirements.lock
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	touch $@

quickstart: install
	$(BIN)/python -m underdrawing.quickstart --seed $(SEED)

lint: install
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Without the lock: what a user gets who installs the newest of everything. A scheduled job runs it, so that drift is
# seen here first. It has an environment of its own, made anew each time.
install-newest:
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade pip
	.venv-newest/bin/python -m pip install --quiet --editable '.[dev]'

test-newest: install-newest
	.venv-newest/bin/python -m underdrawing doctor --no-ray || true
	.venv-newest/bin/ruff check --quiet .
	.venv-newest/bin/mypy
	.venv-newest/bin/python -m pytest -n 2 --dist loadfile

# Resolve both locks again, to the newest versions that pyproject.toml admits.
UV_COMPILE := $(BIN)/uv pip compile --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command 'make lock' --quiet
lock: install
	$(UV_COMPILE) requirements-build.in --output-file requirements-build.lock
	$(UV_COMPILE) pyproject.toml --extra dev --output-file requirements.lock

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
