# Every target sets itself up; `make install` creates .venv/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install evaluate test test-chaos check bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,baselines,dev,mlx]'
	touch $(STAMP)

evaluate: install
	$(BIN)/sdt evaluate --output results/quickstart --resume

test: install
	$(BIN)/python -m pytest

test-chaos: install
	$(BIN)/python -m pytest -m chaos

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

bench: install
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) results
