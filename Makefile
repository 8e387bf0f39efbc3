# From a bare clone, with Python 3.10 to 3.13 and pip, each target makes .venv first and reuses it afterwards.
# BUILD=cpu or BUILD=cuda overrides what `.ci/setup` finds out about the machine; PYTHON= names an interpreter.
PY := .venv/bin/python
ARGS ?=
# Test processes beside each other, each with rank pools of its own (9 processes); `WORKERS=0` runs all in one.
WORKERS ?= 2
export BUILD PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all test-kill test-launch test-wheel gpu check docs docs-tables bench clean distclean

help: ## list the targets (this)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make or renew .venv; takes no time when nothing has changed
	@.ci/setup

train: setup ## train the quickstart model on two ranks; ARGS="..." is appended
	$(PY) -m shardembed train configs/train/quickstart.yaml --ranks 2 $(ARGS)

test: setup ## run tests of every kind in some five minutes; ARGS="tests/unit -k route" narrows them
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: setup ## run all that is tried, and not only the sample that "test" takes of it; some ten minutes
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --all $(ARGS)

test-kill: setup ## kill and stop ranks at every stage of training, saving and loading; a sample is in "test"
	$(PY) -m pytest tests/kill --kill-matrix -q $(ARGS)

test-launch: setup ## launch a job in every way that launch/ has; not part of "test"
	$(PY) -m pytest tests/launch --launchers -q $(ARGS)

test-wheel: setup ## build the wheel, and try it in new environments: the core alone, and with each extra
	@.ci/wheel

gpu: ## see what GPU code does on this machine's GPUs, without installing anything; PYTHON= names the interpreter
	@.ci/gpu $(ARGS)

check: setup ## lint, formatting and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m basedpyright

docs: setup ## build the documentation site in docs/_build/html; warnings are errors
	@$(PY) -c 'import sys; sys.exit("make docs needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	@$(PY) -m pip install --disable-pip-version-check --no-input --quiet -r requirements/docs.txt
	$(PY) -m sphinx -W -E --keep-going -n -q -d docs/_build/doctrees docs docs/_build/html

docs-tables: setup ## write the tables of settings and optimizers in docs/reference again, from the code; a test asks for it
	$(PY) -m docs.extension.tables

bench: setup ## measure this machine; ARGS="..." is appended
	$(PY) -m shardembed bench $(ARGS)

clean: ## remove caches and build leftovers; .venv and runs/ stay
	rm -rf build dist docs/_build *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## as clean, and remove .venv too
	rm -rf .venv
