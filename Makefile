# make demo: a verified device bundle of the embedded example. make test: tests and linters.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2
export OMP_WAIT_POLICY ?= passive
WORKERS ?= 2

.PHONY: setup demo test test-all lint bench clean
.DEFAULT_GOAL := demo

setup: .venv/.installed

# torch first: whichever build is found for it, nothing that follows replaces it.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "slimport needs Python 3.11 or newer, this is %d.%d; run: make PYTHON=python3.11" % v[:2])'
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable ".[qnn]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[coreai]" || echo "Core AI's beta does not install here: what needs it is skipped, and container coreai is exit 6"
	touch $@

demo: setup
	$(BIN)/slimport export --target android --config examples/storyteller/slimport.toml --output dist

test: setup lint
	$(BIN)/python -m pytest tests -n $(WORKERS) -m "not slow"

test-all: setup lint
	$(BIN)/python -m pytest tests -n $(WORKERS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/solver.py
	$(BIN)/python benchmarks/export_speed.py
	$(BIN)/python benchmarks/export_memory.py
	$(BIN)/python benchmarks/onnx_builder.py
	$(BIN)/python benchmarks/executorch_export.py
	$(BIN)/python benchmarks/coreml_export.py

clean:
	rm -rf .venv dist build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
