PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow check coverage docs clean

demo: $(READY)  ## Five hospitals train a chest X-ray classifier; prints where the report is.
	$(BIN)/fedmed demo

test: $(READY)  ## The test suite, but for what takes minutes.
	$(BIN)/python -m pytest -m "not slow" -n 2

test-slow: $(READY)  ## Tests that start Flower's own processes or take minutes.
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile

check: $(READY)  ## Style, types and floors.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

coverage: $(READY)  ## The test suite, and the lines of each file that it leaves out.
	$(BIN)/python -m pytest -m "not slow" -n 2 --cov=fedmed_flower --cov-report=term-missing:skip-covered

docs: $(READY)  ## The documentation as pages, in build/docs; a warning is an error.
	$(BIN)/sphinx-build -W --keep-going -n -q -b html docs build/docs
	@echo "build/docs/index.html"

# torch first and alone, so that a CPU build that pip is pointed to is taken as it is.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[simulation,dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info
