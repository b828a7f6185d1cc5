# `make demo` and `make test` need Python >= 3.12 and make, nothing else.
SHELL := /bin/sh
VENV ?= .venv
PYTHON := $(VENV)/bin/python
# Further requirements of the environment.
WITH ?=
# A process per core; the tests of a file share compiled programs, so that most are left together.
PARALLEL ?= -n auto --dist worksteal
# Further options of pytest.
OPTIONS ?=
# Which part of the thorough tests: k/n, or auto for the one whose turn it is by the number of commits; empty for all.
SHARD ?=
PYTEST = JAXATTN_SHARD=$(SHARD) $(PYTHON) -m pytest $(PARALLEL) $(OPTIONS)
# Thorough tests compile as users do.
THOROUGHLY := JAX_DISABLE_MOST_OPTIMIZATIONS=0
# What pytest and its plugins rewrite of the tests is kept, wherever the environment says otherwise.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo experiments docs jupyter test test-slow test-all test-oldest test-compile resources tables check install clean

help:
	@echo "make demo          train, load, generate on every backend (about two minutes)"
	@echo "make test          the test suite"
	@echo "make test-slow     what it leaves out; with SHARD=k/n a part of it, with SHARD=auto the part that is due"
	@echo "make test-all      everything, SASS included; with SHARD=k/n a part of it"
	@echo "make test-oldest   the main paths on the oldest supported JAX"
	@echo "make test-compile  compile the kernels to SASS, without a GPU; with KIND=compile in every case"
	@echo "make resources     compile the main kernels, write registers and shared memory into their table"
	@echo "make experiments   run every experiment in a small setting, rewrite the tables in experiments/README.md"
	@echo "make jupyter       open the notebooks in JupyterLab"
	@echo "make docs          run every notebook and build the site, notebooks/_build/html/index.html"
	@echo "make tables        rewrite the tables and the picture of the rooms that are printed from the code"
	@echo "make check         lint, types, layering"

demo: $(VENV)/installed
	$(VENV)/bin/jaxattn demo

test: $(VENV)/installed
	$(PYTEST)

test-slow: $(VENV)/installed
	$(THOROUGHLY) $(PYTEST) -m "slow and not compile"

test-all: $(VENV)/installed
	$(THOROUGHLY) $(PYTEST) -m "not compile"
	$(MAKE) test-compile KIND=compile

# Few examples and cases: what the oldest version lacks shows on the first ones.
OLDEST := VENV=.venv-oldest WITH="jax==0.11.2 jaxlib==0.11.2"
test-oldest:
	$(MAKE) .venv-oldest/installed $(OLDEST)
	JAXATTN_EXAMPLES=5 .venv-oldest/bin/python -m pytest $(PARALLEL) -m "smoke and not slow and not compile"

# An environment of its own: JAX would complain of a CUDA plugin without CUDA everywhere else.
test-compile: KIND ?= compile and not slow
test-compile:
	$(MAKE) .venv-compile/installed-compile VENV=.venv-compile
	JAXATTN_SHARD=$(SHARD) JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 \
	  .venv-compile/bin/python -m pytest -n auto -m "$(KIND)" tests/compile

# What the kernels of today take, for review in the diff.
resources:
	$(MAKE) .venv-compile/installed-compile VENV=.venv-compile
	JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 PYTHONPATH=.:kernels \
	  .venv-compile/bin/python tests/compile/write_resources.py --write notebooks/reference/resources.md

tables: $(VENV)/installed
	PYTHONPATH=.:kernels $(PYTHON) tests/support/field_tables.py notebooks/reference/metadata.md
	PYTHONPATH=.:kernels $(PYTHON) tests/compile/write_resources.py notebooks/reference/resources.md
	PYTHONPATH=.:kernels $(PYTHON) tests/support/rooms.py notebooks/_static/rooms.svg

experiments: $(VENV)/installed
	$(PYTHON) experiments/run_all.py

docs: $(VENV)/installed-notebooks
	$(PYTHON) -m sphinx --jobs 2 --fail-on-warning --keep-going notebooks notebooks/_build/html

jupyter: $(VENV)/installed-notebooks
	$(VENV)/bin/jupyter lab notebooks

check: $(VENV)/installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

install: $(VENV)/installed

clean:
	rm -rf .venv .venv-oldest .venv-compile .jax_cache .docs_cache demo-output

# The first interpreter that runs and is new enough. A pyenv shim may exist and still not run.
$(VENV)/bin/python:
	@for p in python3 python python3.12 python3.13 python3.14; do \
	  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then \
	    echo "creating $(VENV) with $$($$p --version)"; exec $$p -m venv $(VENV); \
	  fi; \
	done; \
	echo "jaxattn needs Python >= 3.12, and none of python3, python, python3.12-3.14 is one." >&2; \
	echo "Install one (https://www.python.org/downloads, or: pyenv install 3.12) and run make again." >&2; \
	exit 1

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(PYTHON) -m pip install --quiet --upgrade "pip>=25.1"
	$(PYTHON) -m pip install --quiet --editable . --group dev $(WITH)
	@touch $@

$(VENV)/installed-notebooks: $(VENV)/installed
	$(PYTHON) -m pip install --quiet --group notebooks
	@touch $@

# The compiler's version must be that of jaxlib.
$(VENV)/installed-compile: $(VENV)/installed
	v=$$($(PYTHON) -c 'from importlib.metadata import version; print(version("jaxlib"))') && \
	$(PYTHON) -m pip install --quiet --group compile "jax-cuda13-plugin==$$v" "jax-cuda13-pjrt==$$v"
	@touch $@
