# The two commands a newcomer needs are `make demo` and `make test`; `make help` lists the others.
PYTHON ?= python3
# TORCH=latest tests against the newest torch instead of the pinned one, in an environment of its own.
TORCH ?= pinned
OUT ?= runs/gpu
ONLY ?=
FAMILIES ?=

ifeq ($(TORCH),latest)
VENV ?= .venv-latest
CONSTRAINTS = $(VENV)/constraints.txt
else
VENV ?= .venv
CONSTRAINTS = constraints.txt
endif
BIN = $(VENV)/bin
READY = $(VENV)/.installed
PIP = $(BIN)/python -m pip --disable-pip-version-check
# The two architectures that the kernels are written for; `pip install .` builds for more.
export TORCH_CUDA_ARCH_LIST ?= 8.0;9.0a
NATIVE = $(wildcard csrc/*.cpp csrc/*/*)

.PHONY: help demo test lint types suite gpu bench tables report docs clean
help:
	@echo "make demo            train, compress and fine-tune a CNN on real digits; results in runs/demo"
	@echo "make test            install, build, lint, type-check and run the whole suite (TORCH=latest for the newest torch)"
	@echo "make gpu OUT=DIR     on a machine with an NVIDIA GPU: build, GPU tests, sanitizer, benchmarks (ONLY=tucker2 or build,tests,tucker2,...)"
	@echo "make bench           pytest-benchmark comparisons on this machine"
	@echo "make report          registers, spills, shared memory of every kernel; no GPU needed"
	@echo "make tables          write the generated tables of README.md and docs/ anew"
	@echo "make docs            build the site into build/site"

demo: $(READY)
	$(BIN)/fastrank demo --out runs/demo

test: $(READY) lint types suite

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

types: $(READY)
	$(BIN)/mypy

suite: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -q --durations=8

gpu:
	$(PYTHON) bench/gpu.py --out $(OUT) $(if $(ONLY),--only $(ONLY)) $(if $(FAMILIES),--families $(FAMILIES))

bench: $(READY)
	$(BIN)/python -m pytest bench --benchmark-only -q

report: $(READY)
	$(BIN)/python bench/kernel_report.py

tables: $(READY)
	$(BIN)/python bench/tables.py

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q

$(READY): pyproject.toml setup.py constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),latest)
	grep -vE '^(torch|triton|torchvision)==' constraints.txt > $(CONSTRAINTS)
endif
	@echo "Installing torch and the build tools (several GB the first time) ..."
	$(PIP) install -q -c $(CONSTRAINTS) torch setuptools wheel ninja pybind11
	@echo "Building fastrank ..."
	$(PIP) install -q -c $(CONSTRAINTS) --no-build-isolation -e '.[dev]'
	@touch $@

clean:
	rm -rf build dist *.egg-info fastrank/*.so fastrank/_build_info.json .venv .venv-latest
