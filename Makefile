# make demo and make test work on a fresh machine with Python 3.11 or later; everything is installed into .venv.
# Another interpreter: make test PYTHON=python3.12      Another build of torch: make test TORCH='torch>=2.11'
# A part of the tests: make test ARGS='tests/core -x'   make test ARGS=tests/keras ENGINE=jax
# More arguments:      make demo ARGS='--epochs 5 --seeds 1'

PYTHON ?= python3
VENV ?= .venv
# Installed before everything else, and named again with it: what depends on torch then keeps this build of it.
TORCH ?= torch==2.13.0
ARGS ?=
# The Keras tests run on each of the engines, each time in a process of its own; ENGINE is for a part of the tests.
ENGINES = jax tensorflow torch
ENGINE ?= torch
# The page of crcore report is tested in one of these.
BROWSERS = chromium google-chrome google-chrome-stable chromium-browser
KERAS_TESTS = tests/keras tests/parity/test_keras.py backends/crcore_keras

PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
# Tests and demo read nothing from the network.
OFFLINE = HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
# JAX compiles for longer than the tests run; what it compiled once, for the same program, it finds again.
ENGINE_OPTIONS = TF_CPP_MIN_LOG_LEVEL=2 JAX_COMPILATION_CACHE_DIR=$(CURDIR)/$(VENV)/jax-cache \
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench browser clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed-cli  ## install, train the digits in float, QAT and QAT + consistency, print the table
	$(OFFLINE) $(VENV)/bin/python -m crcore.cli compare $(ARGS)

test: browser  ## install, run all tests, those of Keras on each engine
ifeq ($(strip $(ARGS)),)
	@$(MAKE) --no-print-directory --jobs 2 $(ENGINES:%=test-on-%) test-on-core
else
	$(OFFLINE) $(ENGINE_OPTIONS) KERAS_BACKEND=$(ENGINE) $(VENV)/bin/python -m pytest $(ARGS)
endif

# Two at a time; each shows what it found when it is done. "core" is what pyproject.toml lists.
test-on-%:
	@echo "$@: running, takes minutes"
	@log=$(VENV)/$@.log; status=0; $(OFFLINE) $(ENGINE_OPTIONS) OMP_NUM_THREADS=1 KERAS_BACKEND=$(if $(filter core,$*),$(ENGINE),$*) \
	  $(VENV)/bin/python -m pytest $(if $(filter core,$*),,$(KERAS_TESTS)) > $$log 2>&1 || status=$$?; cat $$log; exit $$status

# Debian has a package, Ubuntu has none that runs without snap. Without a browser the tests go on, and those that need one fail.
browser: $(VENV)/.installed-dev  ## install a browser for the tests where there is none (as root, on Debian and Ubuntu)
	@for name in $(BROWSERS); do command -v $$name >/dev/null && exit 0; done; \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get -qq update; \
	    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium && exit 0; \
	    $(VENV)/bin/python -m playwright install --with-deps chromium && exit 0; \
	  fi; \
	  echo "make: no browser for the tests of crcore report; install one of $(BROWSERS)," \
	    "as by: sudo apt-get install chromium" >&2

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy

# ARGS, such as --rounds 3, are torch_step.py's; what is measured for a GPU stays as it is.
bench: $(VENV)/.installed-peers  ## install, measure speed and memory on one CPU thread, rewrite its tables; about an hour
	$(OFFLINE) $(VENV)/bin/python benchmarks/torch_step.py --peers $(VENV)/peers --out benchmarks/results/torch_step-cpu.json $(ARGS)
	$(VENV)/bin/python benchmarks/performance_page.py

clean:  ## remove .venv, caches and builds; runs/ stays
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is written last: an installation that was interrupted is done again, pip then continues where it stopped.
$(VENV)/.created:
	@command -v '$(PYTHON)' >/dev/null || { echo "make: no '$(PYTHON)' here; name a Python 3.11 or later: make PYTHON=/path/to/python3" >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: crcore needs Python 3.11 or later, '$(PYTHON)' is $$('$(PYTHON)' -V 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }
	@'$(PYTHON)' -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "make: '$(PYTHON)' has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	'$(PYTHON)' -m venv $(VENV)
	@touch $@

$(VENV)/.installed-cli: $(VENV)/.created pyproject.toml
	$(PIP) '$(TORCH)'
	$(PIP) --editable '.[cli]' '$(TORCH)'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml
	$(PIP) '$(TORCH)'
	$(PIP) --editable '.[dev]' '$(TORCH)'
	@touch $(VENV)/.installed-cli $@

# Libraries to compare with that would bring another torch along: without what they depend on, but for what they import.
$(VENV)/.installed-peers: $(VENV)/.installed-dev
	$(PIP) --no-deps --upgrade --target $(VENV)/peers nncf nvidia-modelopt \
	  antlr4-python3-runtime==4.9.3 nvidia-ml-py omegaconf openvino-telemetry psutil pulp pydot tabulate
	@touch $@
