PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo notebook test test-gpu soak lint bench bench-quick clean

demo: $(VENV)/installed
	$(BIN)/fedgfe-store demo

notebook: $(VENV)/installed-notebooks | demo/contact_sheet.png
	$(BIN)/jupyter lab notebooks/01_query.ipynb

# The last file that the demo writes.
demo/contact_sheet.png: | $(VENV)/installed
	$(BIN)/fedgfe-store demo

test: lint test-gpu
	$(BIN)/python -m pytest

# What power cuts, kills, broken disks, locks and copying do to stores; hours. Pieces, seeds and a
# short form: tools/soak.py --help.
soak: $(VENV)/installed-dev
	$(BIN)/python tools/soak.py

# The commands on a simulated GPU, in a process of its own: the device has to be there before torch.
test-gpu: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/virtual_gpu

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed-bench
	$(BIN)/python -m benchmarks.compare

bench-quick: $(VENV)/installed-bench
	$(BIN)/python -m benchmarks.compare --quick

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/installed-notebooks: $(VENV)/installed
	$(PIP) --editable '.[notebooks]'
	touch $@

$(VENV)/installed-bench: $(VENV)/installed
	$(PIP) --editable '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo
