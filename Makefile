# `make serve` and `make test` install their dependencies once.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
LMMS   := .venv-lmms
DOCS   := .venv-docs
TOOLS  := .venv-release
RAY    := .venv-ray

# Options of `make serve`:
PORT   ?= 8000
METHOD ?= ficoco-v
KEEP   ?= 64
MODEL  ?=
ARGS   ?=
# Workers of `make test`:
JOBS   ?= 2

# Folder with the chart of vLLM's production stack, for `make charts-check`:
PRODUCTION_STACK ?=

RUNTIME := $(VENV)/.installed
DEV     := $(VENV)/.installed-dev

.PHONY: help install serve test test-long test-kernels check format lint types imports kernels-aot bench-kernels bench-ttft bench-gpu \
    bench-efficiency bench-concurrency bench-chat bench-chat-accuracy bench-decoding \
    soak soak-engine bench-metrics bench-elastic bench-quality bench-load bench-cpu-mode bench-precision \
    bench-accuracy bench-accuracy-decoder bench-smoke figures screenshots lmms dist release-check container-check \
    charts-check ray-check compat docs clean

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

# Environment of the target `FOLDER/.installed`: the packages of a lock on top of the serving environment.
define on_top
@$(BIN)/python -m venv $(@D)
@echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
    > "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/serving.pth"
@$(@D)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --requirement $<
@touch $@
endef

install: $(RUNTIME)  ## make .venv with everything that serving on a CPU needs

serve: $(RUNTIME)  ## serve on PORT; METHOD, KEEP, MODEL, ARGS (default: the demo model, ficoco-v, 64 tokens)
	@exec $(BIN)/ficoco-vllm serve $(MODEL) --port $(PORT) \
	    --ficoco-method $(METHOD) --ficoco-keep $(KEEP) $(ARGS)

# Large tensors go back to the system when they are freed: a worker holds several engines. Bytecode is written also where
# the environment forbids it: each process that a test starts would compile our sources again.
PYTEST := PYTHONDONTWRITEBYTECODE= MALLOC_MMAP_THRESHOLD_=1048576 MALLOC_TRIM_THRESHOLD_=1048576 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test: $(DEV)  ## run the tests, then the kernels' in Triton's interpreter; ARGS replaces the second run
	@status=0; $(PYTEST) -m 'not long and not interpreter' $(ARGS) || status=$$?; \
	    $(if $(ARGS),,$(MAKE) --no-print-directory test-kernels || status=$$?;) exit $$status

test-long: $(DEV) $(LMMS)/.installed  ## run the long forms: servers of more families, load, restarts, several processes, lmms-eval
	@$(PYTEST) -m 'long and not interpreter' $(ARGS)

check: lint types imports  ## ruff, mypy, import-linter

lint: $(DEV)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu

types: $(DEV)
	@$(BIN)/mypy

imports: $(DEV)
	@$(BIN)/lint-imports

format: $(DEV)  ## let ruff rewrite the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

test-kernels: $(DEV)  ## run every fused op, and what replaces kernels of vLLM, against its reference in Triton's interpreter
	@TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m interpreter tests/kernels tests/compat $(ARGS)

kernels-aot: $(DEV)  ## compile the kernels ahead of time for several GPUs and check registers, spills and shared memory
	@OMP_NUM_THREADS=1 $(BIN)/python -m ficoco_vllm.benchmarks.kernels.aot $(ARGS)

bench-kernels: $(DEV)  ## time the fused ops (on a GPU the kernels, else the torch versions)
	@$(BIN)/python -m ficoco_vllm.benchmarks.kernels.bench $(ARGS)

bench-ttft: $(DEV)  ## time to first token at LLaVA-1.5-7B's width, stock and reduced side by side
	@$(BIN)/python -m ficoco_vllm.benchmarks.ttft $(ARGS)

# On a GPU host `python -m ficoco_vllm.benchmarks.gpu` in the environment of `pip install ".[gpu,bench]"`.
bench-gpu:  ## on a GPU host: answers, kernels, tower, serving against stock vLLM; PYTHON is that of the environment
	@$(PYTHON) -m ficoco_vllm.benchmarks.gpu $(ARGS)

bench-precision: $(DEV)  ## kept tokens and log-probabilities in half precision and with an fp8 KV cache, against float64
	@$(BIN)/python -m ficoco_vllm.benchmarks.precision $(ARGS)

bench-efficiency: $(DEV)  ## the rows of the paper's Tables 8 and 9 on whole models: bfloat16, INT8, INT4; none, V, L, VL
	@$(BIN)/python -m ficoco_vllm.benchmarks.efficiency $(ARGS)

bench-concurrency: $(DEV)  ## concurrent requests in the same KV memory: stock, V, L, VL
	@$(BIN)/python -m ficoco_vllm.benchmarks.concurrency $(ARGS)

bench-chat: $(DEV)  ## time later turns of image chats, and requests that share a system prompt: stock and ours with prefix caches
	@$(BIN)/python -m ficoco_vllm.benchmarks.chat $(ARGS)

bench-chat-accuracy: $(DEV)  ## accuracy of decision windows in chats with several questions on one image
	@$(BIN)/python -m ficoco_vllm.benchmarks.chat.accuracy $(ARGS)

bench-decoding: $(DEV)  ## host time of a decoding step with 1, 32 and 256 requests, stock and ours
	@$(BIN)/python -m ficoco_vllm.benchmarks.decoding $(ARGS)

soak: $(DEV)  ## send 10,000 mixed requests to a server that reduces in the tower and to one in the decoder (45 minutes)
	@$(BIN)/python -m ficoco_vllm.benchmarks.soak.server $(ARGS)

soak-engine: $(DEV)  ## send 2,000 mixed requests to a decoder-reducing engine: check for leaked KV blocks and memory
	@$(BIN)/python -m ficoco_vllm.benchmarks.soak.engine $(ARGS)

bench-metrics: $(DEV)  ## time our metrics in the front end, as a share of a request
	@$(BIN)/python -m ficoco_vllm.benchmarks.metrics $(ARGS)

bench-elastic: $(DEV)  ## overload a small KV cache: time to first token at a fixed budget and with --ficoco-elastic
	@$(BIN)/python -m ficoco_vllm.benchmarks.elastic $(ARGS)

bench-quality: $(DEV)  ## traffic that turns from easy to hard and back, with --ficoco-target-agreement
	@$(BIN)/python -m ficoco_vllm.benchmarks.quality $(ARGS)

bench-accuracy: $(DEV)  ## measure the accuracy of the tower's methods by budget, ablations, sensitivity
	@$(BIN)/ficoco-vllm bench accuracy --sites tower --count 19 $(ARGS)

bench-accuracy-decoder: $(DEV)  ## the same for the decoder's methods
	@$(BIN)/ficoco-vllm bench accuracy --sites decoder,both --count 19 --concurrency 32 --out build/accuracy-decoder \
	    $(ARGS)

# Benchmarks write to build/. To publish a result, copy its JSON to benchmarks/results/ first.
figures: $(DEV)  ## write the README's table and pictures, docs/accuracy.md and docs/support.md from benchmarks/results/
	@$(BIN)/python -m ficoco_vllm.benchmarks.accuracy.tables
	@$(BIN)/python -m ficoco_vllm.benchmarks.overview
	@$(BIN)/python -m ficoco_vllm.benchmarks.support

screenshots: $(DEV)  ## redraw the pictures of the page /ficoco/ in docs/images/ (needs Chromium)
	@FICOCO_SCREENSHOTS=docs/images $(BIN)/python -m pytest tests/server/test_viewer.py -k every_state $(ARGS)

bench-smoke: $(DEV)  ## run every benchmark in miniature, and check that planted regressions are detected
	@$(BIN)/python -m pytest tests/benchmarks tests/server/elastic/test_overload.py $(ARGS)

$(LMMS)/.installed: requirements/lmms.lock $(RUNTIME)
	$(on_top)

lmms: $(LMMS)/.installed  ## install lmms-eval on top of the serving environment, for `ficoco-vllm bench lmms`

bench-load: $(DEV)  ## load stock and reducing servers equally, in turns, at LLaVA-1.5-7B's width
	@$(BIN)/ficoco-vllm bench load --model llava-1.5-7b-width --layers 2 --servers stock ficoco-v:64 best:64 random:64 \
	    --concurrency 8 --requests 8 --answer-tokens 16 --bar 1.0 --out build/load $(ARGS)

bench-cpu-mode: $(DEV)  ## time the decoder's methods without a GPU: one client; stock, tower and decoder in turns
	@$(BIN)/ficoco-vllm bench load --servers stock ficoco-v:64 ficoco-l:576 --concurrency 1 --requests 16 \
	    --rounds 2 --bar-token 3 --out build/cpu-mode $(ARGS)

dist: $(DEV)  ## build sdist, wheel (from the sdist) and checksums into dist/
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation --outdir dist .
	@cd dist && sha256sum ficoco_vllm-* > SHA256SUMS

release-check: dist  ## install dist/ into a clean environment outside of the repository, serve, query (minutes)
	@$(BIN)/python -m pytest tests/release/check_install.py $(ARGS)

$(DOCS)/.installed: requirements/docs.lock
	@$(PYTHON) -m venv $(DOCS)
	@$(DOCS)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --requirement requirements/docs.lock
	@touch $@

docs: $(DOCS)/.installed  ## build the documentation into build/site; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build $(ARGS)

container-check: $(DEV)  ## build docker/Dockerfile.cpu with buildah, run and query it (root, Debian packages buildah and debootstrap)
	@$(BIN)/python -m pytest tests/release/check_container.py $(ARGS)

$(TOOLS)/.installed: requirements/release.lock $(DEV)
	$(on_top)

charts-check: $(TOOLS)/.installed  ## render vLLM's Helm charts with our values and check Kubernetes' schemas; PRODUCTION_STACK
	@PRODUCTION_STACK="$(PRODUCTION_STACK)" $(TOOLS)/bin/python -m pytest \
	    tests/release/check_charts.py tests/release/check_production_stack.py $(ARGS)

$(RAY)/.installed: requirements/ray.lock $(DEV)
	$(on_top)

ray-check: $(RAY)/.installed  ## run the Ray Serve recipe on this machine: two replicas, the README's questions (minutes)
	@$(RAY)/bin/python -m pytest -W default tests/release/check_ray.py $(ARGS)

compat: $(TOOLS)/.installed  ## run contract tests against the oldest and newest vLLM in the pinned range, and report changes in the next minor
	@$(TOOLS)/bin/python -m tests.release.compat $(ARGS)

clean:  ## remove the environment and everything built
	@rm -rf $(VENV) $(LMMS) $(DOCS) $(TOOLS) $(RAY) build dist *.egg-info
