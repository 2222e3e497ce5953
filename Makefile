# The two commands a newcomer needs are `make demo` and `make test`; `make help` lists the others.
PYTHON ?= python3
# TORCH=latest tests against the newest torch instead of the pinned one, in an environment of its own.
TORCH ?= pinned
OUT ?= runs/gpu
ONLY ?=
FAMILIES ?=

ifeq ($(TORCH),latest)
VENV ?= .venv-latest
else
VENV ?= .venv
endif
BIN = $(VENV)/bin
READY = $(VENV)/.installed
PIP = $(BIN)/python -m pip --disable-pip-version-check
# The two architectures that the kernels are written for; `pip install .` builds for more.
export TORCH_CUDA_ARCH_LIST ?= 8.0;9.0a
NATIVE = $(wildcard csrc/*.cpp csrc/*/*)

.PHONY: reliability help demo test lint types suite gpu bench bench-cpu growth compare fuzz faults mutants coverage soak sanitize
.PHONY: tables report docs lock audit clean
help:
	@echo "make demo            train, compress and fine-tune a CNN on real digits; results in runs/demo"
	@echo "make test            install, build, lint, type-check and run the whole suite (TORCH=latest for the newest torch)"
	@echo "make gpu OUT=DIR     on a machine with an NVIDIA GPU: build, GPU tests, sanitizer, benchmarks (ONLY=tucker2 or build,tests,tucker2,...)"
	@echo "make bench           pytest-benchmark comparisons on this machine"
	@echo "make compare BASE=REV  the same cases here and on another revision, in turns; make growth: cost against size"
	@echo "make reliability     all of: bench-cpu fuzz faults mutants coverage soak sanitize (two hours); each ends in one line"
	@echo "make report          registers, spills, shared memory of every kernel; no GPU needed"
	@echo "make tables          write the generated tables of README.md and docs/ anew"
	@echo "make docs            build the site into build/site"
	@echo "make lock audit      write requirements.lock anew; ask a vulnerability database about it"

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

# Each of these ends in a line with its figure. KEEP=--keep writes the result where docs/reliability.md takes it from.
KEEP ?=
RELIABILITY = bench-cpu fuzz faults mutants coverage soak sanitize
reliability: $(RELIABILITY)

bench-cpu: $(READY)
	FASTRANK_KEEP=$(if $(KEEP),1) $(BIN)/python -m pytest bench --benchmark-only -q

growth: $(READY)
	$(BIN)/python bench/growth.py $(KEEP)

BASE ?= main
compare: $(READY)
	$(BIN)/python bench/compare.py --base $(BASE)

fuzz: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/reliability/fuzz.py $(KEEP)

faults: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/reliability/kills.py $(KEEP)

mutants: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/reliability/mutants.py $(KEEP)

coverage: $(READY)
	$(BIN)/python tests/reliability/covered.py $(KEEP)

soak: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/reliability/soak.py $(KEEP)

sanitize: $(READY)
	$(BIN)/python tests/reliability/sanitize.py $(KEEP)

report: $(READY)
	$(BIN)/python bench/kernel_report.py

tables: $(READY)
	$(BIN)/python bench/tables.py

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q

# Every file that is installed has its hash in requirements.lock; with TORCH=latest only the other packages' versions
# are held. First come setuptools, because one package has no wheel and is built with it, and pip: that of a fresh Python
# 3.10 or 3.11 refuses a package asked for with an extra as soon as there is a newer version of it than the pinned one.
$(READY): pyproject.toml setup.py requirements.lock $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	@echo "Installing torch and the build tools (several GB the first time) ..."
ifeq ($(TORCH),latest)
	grep -E '^[a-zA-Z]' requirements.lock | grep -vE '^(torch|triton|torchvision|nvidia-.*|cuda-.*)==' | tr -d '\\\\' > $(VENV)/held.txt
	$(PIP) install -q -c $(VENV)/held.txt torch setuptools wheel ninja pybind11
	@echo "Building fastrank ..."
	$(PIP) install -q -c $(VENV)/held.txt --no-build-isolation -e '.[dev]'
else
	awk '/^[a-z]/ {first = /^(pip|setuptools)==/} first' requirements.lock > $(VENV)/first.txt
	$(PIP) install -q --require-hashes -r $(VENV)/first.txt
	$(PIP) install -q --require-hashes --no-build-isolation -r requirements.lock
	@echo "Building fastrank ..."
	$(PIP) install -q --no-deps --no-build-isolation -e .
endif
	@touch $@

lock:
	uv pip compile pyproject.toml --extra dev --universal --generate-hashes --python-version 3.10 \
	  --allow-unsafe --no-annotate --custom-compile-command "make lock" -o requirements.lock

audit:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install -q pip-audit
	.venv-audit/bin/pip-audit --strict --disable-pip --require-hashes -r requirements.lock

clean:
	rm -rf build dist *.egg-info fastrank/*.so fastrank/_build_info.json .venv .venv-latest
