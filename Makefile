PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

SHELL := bash
# What `time` says of a command below.
export TIMEFORMAT := took %0R s, %0U + %0S s of the processors

# A process of tests for each core and one more, since they wait a fifth of the time. Each runs whole
# files: a file's tests share what they make.
PROCESSES := $(shell echo $$(( $$(nproc 2> /dev/null || echo 2) + 1 )))
PARALLEL := --numprocesses $(PROCESSES) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo notebook docs test test-long test-fast test-gpu test-pythons soak lint bench bench-quick clean

demo: $(VENV)/installed
	$(BIN)/fedgfe-store demo

notebook: $(VENV)/installed-notebooks | demo/contact_sheet.png
	$(BIN)/jupyter lab notebooks/01_query.ipynb

# The last file that the demo writes.
demo/contact_sheet.png: | $(VENV)/installed
	$(BIN)/fedgfe-store demo

# The site, in build/site; a link or an anchor that leads nowhere ends it.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

test: lint test-gpu
	time $(BIN)/python -m pytest $(PARALLEL) -m "not long"

# What is left out of `make test`: every model where some stand for all, and full sizes.
test-long: $(VENV)/installed-long
	$(BIN)/python -m pytest $(PARALLEL) -m long
	$(BIN)/python -m pytest $(PARALLEL) -m long tests/virtual_gpu

# All of it with every one of these Pythons that is there, each in an environment of its own.
PYTHONS := 3.11 3.12 3.13

test-pythons:
	@tested=; failed=; \
	for version in $(PYTHONS); do \
	    if ! python$$version -c "" 2> /dev/null; then \
	        echo "python$$version: not tested, there is none"; \
	        continue; \
	    fi; \
	    tested+=" $$version"; \
	    $(MAKE) test PYTHON=python$$version VENV=.venv-$$version || failed+=" $$version"; \
	done; \
	echo "tested:$${tested:- no Python}, failed:$${failed:- none}"; \
	[ -n "$$tested" ] && [ -z "$$failed" ]

# While one works: all but what is slow, drives a browser, kills or loads a model.
test-fast: $(VENV)/installed-dev
	time $(BIN)/python -m pytest $(PARALLEL) -m "not slow and not browser and not kill and not model and not long"

# What power cuts, kills, broken disks, locks and copying do to stores; hours. Pieces, seeds and a
# short form: tools/soak.py --help.
soak: $(VENV)/installed-long
	$(BIN)/python tools/soak.py

# The commands on a simulated GPU, in a process of its own: the device has to be there before torch.
test-gpu: $(VENV)/installed-dev
	time $(BIN)/python -m pytest $(PARALLEL) -m "not long" tests/virtual_gpu

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	time $(BIN)/mypy

bench: $(VENV)/installed-bench
	$(BIN)/python -m benchmarks.compare
	$(BIN)/python -m benchmarks.upkeep

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

# Ray and UMAP's numba take 240 MB each and half a minute, Azurite as much, W&B 60 MB; without npm Azurite's
# tests and those with axe-core are skipped.
$(VENV)/installed-long: $(VENV)/installed-dev
	$(PIP) --editable '.[map,ray,wandb]'
	npm install --silent --no-audit --no-fund --prefix $(VENV)/azurite azurite@3.37 || true
	npm install --silent --no-audit --no-fund --prefix $(VENV)/axe axe-core@4.14.1 || true
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(PIP) --editable '.[docs]'
	touch $@

$(VENV)/installed-notebooks: $(VENV)/installed
	$(PIP) --editable '.[notebooks]'
	touch $@

$(VENV)/installed-bench: $(VENV)/installed
	$(PIP) --editable '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) $(PYTHONS:%=.venv-%) build dist *.egg-info demo
