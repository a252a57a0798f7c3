# `make serve` and `make test` install what they need first; a second call does not install again.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
LMMS   := .venv-lmms

# Of `make serve`:
PORT   ?= 8000
METHOD ?= ficoco-v
KEEP   ?= 64
MODEL  ?=
ARGS   ?=

RUNTIME := $(VENV)/.installed
DEV     := $(VENV)/.installed-dev

.PHONY: help install serve test test-kernels check format lint types imports kernels-aot bench-kernels bench-ttft \
    bench-concurrency bench-metrics bench-elastic bench-load bench-accuracy bench-smoke lmms clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

$(BIN)/python:
	@echo "creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "Python 3.11 is needed; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(RUNTIME): requirements/cpu.lock requirements/install.sh pyproject.toml requirements/interpreter/pyproject.toml | $(BIN)/python
	@echo "installing (about 1.2 GB, a few minutes the first time)"
	@requirements/install.sh $(BIN)/python
	@touch $@

$(DEV): requirements/dev.lock $(RUNTIME)
	@requirements/install.sh $(BIN)/python requirements/dev.lock
	@touch $@

install: $(RUNTIME)  ## make .venv with everything that serving on a CPU needs

serve: $(RUNTIME)  ## serve on PORT; METHOD, KEEP, MODEL, ARGS (default: the demo model, ficoco-v, 64 tokens)
	@exec $(BIN)/ficoco-vllm serve $(MODEL) --port $(PORT) \
	    --ficoco-method $(METHOD) --ficoco-keep $(KEEP) $(ARGS)

test: $(DEV)  ## run the tests
	@$(BIN)/python -m pytest $(ARGS)

check: lint types imports  ## ruff, mypy, import-linter

lint: $(DEV)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(DEV)
	@$(BIN)/mypy

imports: $(DEV)
	@$(BIN)/lint-imports

format: $(DEV)  ## let ruff rewrite the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

test-kernels: $(DEV)  ## every fused op against its reference, in Triton's interpreter
	@TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/kernels $(ARGS)

kernels-aot: $(DEV)  ## compile the kernels for GPUs that are not here, with bars
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.kernels.aot --json build/kernels-aot.json $(ARGS)

bench-kernels: $(DEV)  ## time the fused ops (on a GPU the kernels, else the torch versions)
	@$(BIN)/python -m benchmarks.kernels.bench --out build/kernels $(ARGS)

bench-ttft: $(DEV)  ## time to first token at LLaVA-1.5-7B's width, stock and reduced side by side
	@$(BIN)/python -m benchmarks.ttft $(ARGS)

bench-concurrency: $(DEV)  ## requests that run at once under the same KV memory: stock, V, L, VL
	@$(BIN)/python -m benchmarks.concurrency $(ARGS)

bench-metrics: $(DEV)  ## throughput with our metrics against without, interleaved
	@$(BIN)/python -m benchmarks.metrics $(ARGS)

bench-elastic: $(DEV)  ## overload a small KV cache: time to first token at a fixed budget and with --ficoco-elastic
	@$(BIN)/python -m benchmarks.elastic $(ARGS)

bench-accuracy: $(DEV)  ## accuracy of the tower's methods by budget, ablations, sensitivity; then docs/accuracy.md
	@$(BIN)/ficoco-vllm bench accuracy --sites tower --count 19 --few-count 19 --out benchmarks/results/accuracy.json $(ARGS)
	@$(BIN)/python -m ficoco_vllm.benchmarks.accuracy.tables

bench-smoke: $(DEV)  ## every benchmark in miniature, and that planted regressions are noticed
	@$(BIN)/python -m pytest tests/benchmarks $(ARGS)

$(LMMS)/.installed: requirements/lmms.lock $(RUNTIME)
	@$(BIN)/python -m venv $(LMMS)
	@echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	    > "$$($(LMMS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ficoco_vllm_serving.pth"
	@$(LMMS)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --requirement requirements/lmms.lock
	@touch $@

lmms: $(LMMS)/.installed  ## an environment with lmms-eval on top of the serving one, for `ficoco-vllm bench lmms`

bench-load: $(DEV)  ## stock and reducing servers under the same load, in turns, at LLaVA-1.5-7B's width
	@$(BIN)/ficoco-vllm bench load --model llava-1.5-7b-width --layers 2 --requests 24 --answer-tokens 16 --bar 1.0 $(ARGS)

clean:  ## remove the environment and everything built
	@rm -rf $(VENV) $(LMMS) build dist *.egg-info
