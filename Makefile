# One-word commands. The first use of any of them makes the environment: .venv, from pinned versions with hashes.
# uv is used where it is installed, otherwise venv and pip. Nothing here needs root but `make lab` and the lab tests.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
UV     := $(shell command -v uv 2>/dev/null)

.PHONY: demo test test-all lint format types lab image bench docs clean env env-gateway

ifdef UV
create  = test -x $(BIN)/python || uv venv --quiet --python $(PYTHON) $(VENV)
install = uv pip install --quiet --python $(BIN)/python
else
# An environment that uv made has no pip; venv puts it in.
create  = $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
install = $(BIN)/python -m pip install --quiet --disable-pip-version-check
endif

# The version is checked first: a clear line instead of a resolver's page.
check_python = $(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Chargehand needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12 ...")'

$(VENV)/gateway: requirements/gateway.txt pyproject.toml
	@$(check_python)
	@$(create)
	@echo "setting up: $(VENV) (once)"
	@$(install) --require-hashes -r requirements/gateway.txt
	@$(install) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/dev: requirements/dev.txt pyproject.toml
	@$(check_python)
	@$(create)
	@echo "setting up: $(VENV) with the tools of development (once)"
	@$(install) --require-hashes -r requirements/dev.txt
	@$(install) --no-deps --no-build-isolation -e .
	@touch $@ $(VENV)/gateway

env: $(VENV)/dev
env-gateway: $(VENV)/gateway

# The main job, for real, on this computer. Exit status 0 means that everything it shows is true.
demo: $(VENV)/gateway
	@$(BIN)/chargehand demo $(DEMO)

# The tests that need nothing but this checkout, in seconds.
test: $(VENV)/dev
	@$(BIN)/python -m pytest

# Everything: real MLflow, real machines. As root on a Debian box; see docs/lab.md.
test-all: $(VENV)/dev
	@$(BIN)/python -m pytest -m "slow or not slow"

lint: $(VENV)/dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-cache

format: $(VENV)/dev
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

types: $(VENV)/dev
	@$(BIN)/mypy

# Three real machines to try things on by hand; Ctrl-C takes them away.
lab: $(VENV)/dev
	@$(BIN)/python -m tests.lab up $(LAB)

# The worker's container image as an archive; needs no registry.
image: $(VENV)/gateway
	@$(BIN)/python -m quadlets.image $(IMAGE)

bench: $(VENV)/dev
	@$(BIN)/python -m bench $(BENCH)

docs: $(VENV)/dev
	@$(BIN)/python -m pytest -q tests/docs

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache bench/results
