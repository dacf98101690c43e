# The commands of the README. Everything is installed into .venv from the project's own files.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo test bench gpu dev lint cuda-compile asan clean

help:
	@echo "make demo   install into .venv, run the demo, results in demo_out/"
	@echo "make test   install into .venv, run the default test suite"
	@echo "make bench  kernels against PyTorch (pytest-benchmark), table and JSON in benchmarks/results/"
	@echo "make gpu    on a machine with a GPU: build, CUDA tests, all GPU benchmarks"
	@echo "make dev    build the cores beside the Python sources (PYTHONPATH=python)"
	@echo "make lint   ruff, mypy, clang-format"
	@echo "make asan   the tests of the kernels with address and undefined-behavior sanitizers"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip

# torch first: the pinned version, so that no resolver looks for a newer one, and its build for CPUs where
# PyTorch's own index answers within five seconds (pip itself would go on asking for minutes). TORCH_INDEX
# names another one; empty, torch comes from the configured index alone.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
$(VENV)/.torch: constraints.txt | $(BIN)/python
	index=$$($(BIN)/python -c 'import sys, urllib.request as u; a = sys.argv[1]; u.urlopen(a + "/torch/", timeout=5); print("--extra-index-url", a)' '$(TORCH_INDEX)' 2>/dev/null); \
	$(PIP) $$index torch==$$(sed -n 's/^torch==//p' constraints.txt) numpy
	@touch $@

SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc cmake python -type f \
	-not -name '*.so' -not -path '*__pycache__*' 2>/dev/null)

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	@echo "Compiling the kernels: about six minutes on two cores the first time, longer where there is nvcc."
	@echo "It takes g++ >= 10 (clang: kernels of one thread) and the headers of Python (python3-dev)."
	$(PIP) '.[video,train,metrics,hub,cli,bench,test]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/magvit-fast demo --out demo_out

# The third-party models that the drop-in backend is tested on: what the extra [compat] names, as the
# installed package says. magvit2-pytorch itself without its dependencies: they name a torchvision,
# and no build of it fits the pinned torch.
$(VENV)/.compat: $(VENV)/.installed
	$(PIP) $$($(BIN)/python -c 'from importlib.metadata import requires; print(*(r.split(";")[0] for r in requires("magvit_fast") if "compat" in r.partition(";")[2]))')
	$(PIP) --no-deps magvit2-pytorch
	@touch $@

# Two processes of one thread each (tests/ops: two, which must not spin while they wait for the other's).
test: $(VENV)/.compat
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(VENV)/.installed
	$(PIP) vector-quantize-pytorch
	$(BIN)/python -m benchmarks.run

gpu:
	$(PYTHON) -m benchmarks.gpu_session

# cmake and ninja come with the development extra, so the presets find them in .venv first.
dev cuda-compile asan: export PATH := $(CURDIR)/$(BIN):$(PATH)

# Installed once, for the tools; later changes of sources are built here alone.
$(BIN)/ninja:
	$(MAKE) $(VENV)/.installed

dev: | $(BIN)/ninja
	cmake --preset dev && cmake --build --preset dev

lint: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

# CUDA sources must compile, with warnings as errors, on machines without a GPU.
cuda-compile: $(VENV)/.installed
	cmake --preset ci && cmake --build --preset ci

asan: $(VENV)/.installed
	cmake --preset asan && cmake --build --preset asan
	.ci/sanitize build/asan

clean:
	rm -rf build $(VENV) demo_out
