# make demo    the main job on real text: swap the module into two models, train, compare (about 2 minutes)
# make test    the tests (under 15 minutes on 2 cores)
# make full    the tests marked `slow` too
# make docs    the documents as a site in build/site, warnings as errors
# make lint    formatting, lint, types: what the pre-commit hooks run
# make clean   removes the environment and what builds leave behind
#
# Each makes .venv first where it is missing or older than pyproject.toml. Variables:
#   PYTHON       the interpreter to make .venv with (3.10 or newer)
#   TORCH_SPEC   what pip installs as torch; quoted options may follow, such as an index with CPU-only builds
#   PYTEST_ARGS  added to pytest's arguments
#   ATTN_CUDA    0 leaves out the CUDA kernels, which take about 6 minutes more where nvcc is found

PYTHON ?= python3
TORCH_SPEC ?= torch==2.13.0
PYTEST_ARGS ?=
VENV := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
INSTALLED := $(VENV)/.installed
DEV_INSTALLED := $(VENV)/.dev-installed
DOCS_INSTALLED := $(VENV)/.docs-installed
BUILT := $(VENV)/.built
SOURCES := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cuh csrc/*/*.cu csrc/*/*/*.cu)
SOURCES += attn/toolchain.py attn/cuda_toolchain.py

.PHONY: demo test full slow lint docs env clean

demo: $(BUILT)
	@$(BIN)/python -m attn demo

test: $(BUILT)
	@$(BIN)/pytest $(PYTEST_ARGS)

full: $(BUILT)
	@$(BIN)/pytest -m "slow or not slow" $(PYTEST_ARGS)

slow: $(BUILT)
	@$(BIN)/pytest -m slow $(PYTEST_ARGS)

lint: $(DEV_INSTALLED)
	@PATH="$(abspath $(BIN)):$$PATH" pre-commit run --all-files --show-diff-on-failure

docs: $(DOCS_INSTALLED)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

env: $(BUILT)

$(INSTALLED): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "attn needs Python 3.10 or newer; %s is %d.%d. Cure: make PYTHON=python3.11 ..." % (sys.executable, v[0], v[1]))'
	@echo "== 1/4 an environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "== 2/4 $(TORCH_SPEC) (several minutes where it has to be downloaded)"
	@$(BIN)/python -m pip install $(TORCH_SPEC)
	@echo "== 3/4 this package, with what its tests and its demo need"
	@ATTN_CPP=0 ATTN_CUDA=0 $(BIN)/python -m pip install -q -e ".[test,bench]"
	@touch $@

# By itself, and not within pip, which would show nothing of it for its minutes.
$(BUILT): $(INSTALLED) $(SOURCES)
	@echo "== 4/4 the compiled kernels (ATTN_CPP=0 leaves them out, ATTN_CUDA=0 those for CUDA)"
	@$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

$(DEV_INSTALLED) $(DOCS_INSTALLED): $(VENV)/.%-installed: $(BUILT)
	@$(BIN)/python -m pip install -q -e ".[$*]"
	@touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache .benchmarks
	rm -f attn/_native_*.so attn/_build_info.py
