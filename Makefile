# Every target takes a fresh clone, python3 (3.10 or newer) and g++ to its result; a second run does only what changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CXX_FILES = $(shell find csrc tests/emulator -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh')

# A core that does not compile must stop `make`, not fall back to the reference backend.
export FUSEDSEQ_REQUIRE_CORE := 1
# The GPU kernels take minutes to compile and no test but those of `make cuda` needs them: their sources run under an
# emulator.
export FUSEDSEQ_CUDA ?= 0

.PHONY: help demo test lint format bench sanitize build cuda device clean

help:
	@echo "make demo      train recurrent and attentive forecasters, torch beside fusedseq; writes out/forecast.png"
	@echo "make test      build, then run the tests"
	@echo "make bench     time the modules beside torch.nn and others (docs/benchmarks.md)"
	@echo "make lint      ruff, clang-format and mypy, changing nothing"
	@echo "make format    ruff and clang-format, in place"
	@echo "make sanitize  the core tests on a core built with AddressSanitizer and UBSan"
	@echo "make build     create $(VENV) and compile the core"
	@echo "make cuda      compile the GPU kernels with nvcc and hold their registers and shared memory against the budget"
	@echo "make device    on a machine with a GPU: everything that only it can tell; PART=rnn|attention|all"
	@echo "make clean     remove all that was built, but keep $(VENV)"

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fusedseq needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.requirements: requirements-dev.txt $(VENV)/.python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# An editable install maps kernels/ and bench/ into the package; the compiled core is then built in place.
$(VENV)/.installed: setup.py pyproject.toml $(VENV)/.requirements
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

build: $(VENV)/.installed
	@$(BIN)/python setup.py -q build_ext --inplace

demo: build
	$(BIN)/python examples/forecast.py

test: build
	$(BIN)/python -m pytest $(ARGS)

bench: build
	$(BIN)/python -m fusedseq bench $(ARGS)

lint: $(VENV)/.requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# A whole copy of the package with its own core, found through PYTHONPATH, so that the normal build stays as it is.
# `pytest` and not `python -m pytest`: the latter would put the repository, and the normal core, first.
SANITIZED := build/sanitize
SANITIZE_TESTS ?= tests/test_isa.py tests/test_parity.py tests/test_recompute.py tests/test_freeze.py tests/test_repeat.py tests/test_attention_parity.py \
    -k "isa or cpu or bits"
sanitize: build
	FUSEDSEQ_SANITIZE=1 $(BIN)/python setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	LD_PRELOAD="$$($(or $(CXX),g++) -print-file-name=libasan.so) $$($(or $(CXX),g++) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED)/lib \
	$(BIN)/pytest -p no:cacheprovider $(SANITIZE_TESTS) $(ARGS)

cuda: $(VENV)/.installed
	FUSEDSEQ_CUDA=1 $(BIN)/python setup.py -q build_ext --inplace
	FUSEDSEQ_CUDA=1 $(BIN)/python -m pytest tests/test_cuda_resources.py $(ARGS)

# On a bare machine: needs no $(VENV) and no network.
PART ?= all
device:
	$(PYTHON) bench/device.py --part $(PART) $(ARGS)

clean:
	rm -rf build dist *.egg-info out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find fusedseq -name '*.so' -delete
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -f $(VENV)/.installed
