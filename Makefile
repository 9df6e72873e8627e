# Two commands matter: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
# Arguments for the torch install; where your index's default build needs a GPU, name the CPU build here.
TORCH_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo clean-demo test test-faults lint format clean

# Both searches at a time, each on half of the processors: networks this small gain nothing from more threads.
demo: $(VENV)/.installed
	@$(MAKE) --no-print-directory --jobs 2 demo-digits demo-digits_consistency

demo-%: SHELL := bash
demo-%: $(VENV)/.installed
	@set -o pipefail; export OMP_NUM_THREADS=$$(( ($$(getconf _NPROCESSORS_ONLN) + 1) / 2 )); \
	    $(BIN)/lcsc search experiment=$* train_if_missing=true runs_dir=demo/runs bank.path=demo/banks/$* 2>&1 \
	    | (trap '' INT; while IFS= read -r line; do printf '%s\n' "$* | $$line"; done)

clean-demo:
	rm -rf demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# The fault tests at their full counts, and the page that is written from them.
test-faults: $(VENV)/.installed-dev
	rm -rf build/faults
	LCSC_FAULT_COUNTS=build/faults $(BIN)/python -m pytest tests/fault
	LCSC_FAULT_COUNTS=build/faults $(BIN)/python -m pytest -m faults
	$(BIN)/python benchmarks/faults.py build/faults

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_ARGS) $$(grep '^torch==' constraints.txt)
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .import_linter_cache
