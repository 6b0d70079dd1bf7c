# make demo   a synthetic slide and volume, explained end to end (into demo/)
# make test   the default test suite
# make lint   ruff, formatting, types
# make browser   a Chromium for tests/browser (skipped without): the one there is, else Debian's, installed if you are root
# Each works on a fresh clone with Python 3.11 to 3.13, pip and make; PYTHON=... picks another interpreter.

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
BIN := .venv/bin
STAMP := .venv/installed
# Libraries that the tests compare with (80 MB to download); without their dependencies, which would replace torch.
FIELD := .venv/field
# Compiling all of 170 packages takes a minute; what is imported is compiled then.
PIP_FLAGS ?= --quiet --no-compile
# One process a core; tests that share a Ray or a Prefect server stay together in one.
PYTEST_FLAGS ?= -n auto --dist loadgroup --no-loadscope-reorder

# Linux's default torch wheel brings several GB of CUDA. Where there is no GPU, name the index of PyTorch's CPU builds
# (its installation page has the address): make test TORCH_INDEX=...
TORCH_INDEX ?=

export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1
export RAY_USAGE_STATS_ENABLED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint browser install clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/gigacam demo --out demo

test: $(STAMP) $(FIELD)
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy flows workers schemas
	$(BIN)/mypy --check-untyped-defs tests

browser:
	@if [ -n "$$GIGACAM_CHROMIUM" ]; then echo "browser tests use $$GIGACAM_CHROMIUM"; \
	elif command -v chromium chromium-browser google-chrome; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; \
	else echo "no Chromium here: install your system's package, or name one: export GIGACAM_CHROMIUM=/path/to/chromium" >&2; exit 1; fi

install: $(STAMP)

$(STAMP): pyproject.toml deploy/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "gigacam needs Python 3.11 to 3.13; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	    "Name another: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	@echo "installing into .venv with $$($(PYTHON) --version) (about 2 GB on disk, some minutes)"
	$(PYTHON) -m venv --clear .venv
	$(if $(TORCH_INDEX),-$(BIN)/pip install $(PIP_FLAGS) --retries 1 --timeout 15 --no-deps -c deploy/constraints.txt --extra-index-url $(TORCH_INDEX) torch)
	$(BIN)/pip install $(PIP_FLAGS) -c deploy/constraints.txt -e '.[test]'
	@touch $@

$(FIELD): tests/bench/requirements.txt $(STAMP)
	$(BIN)/pip install $(PIP_FLAGS) --no-deps -c deploy/constraints.txt -r tests/bench/requirements.txt
	@touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build dist
