# Two commands for a new user: make demo, make test. Everything else is for those who work on taut.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
WORKERS ?= 2
export TOKENIZERS_PARALLELISM = false

.PHONY: demo demo-short test test-all test-lowest lint contract docs clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/test: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e '.[test]'
	touch $@ $(VENV)/demo

demo: $(VENV)/demo  ## compare ways to lighten a real model, and draw report.html
	$(BIN)/taut compare studies/quickstart.yaml --report report.html

demo-short: $(VENV)/demo
	$(BIN)/taut compare studies/quickstart.yaml --report report.html --only 'table int8' --only 'cache of an encoder'

test: $(VENV)/test lint  ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) -m 'not full'

test-all: $(VENV)/test  ## every method on every family
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) -m full

test-lowest:  ## the contract on the oldest transformers we promise
	$(PYTHON) -m venv $(VENV)-lowest
	grep -v -E '^(transformers|huggingface_hub|tokenizers)==' constraints.txt > $(VENV)-lowest/constraints.txt
	$(VENV)-lowest/bin/pip --quiet install -c $(VENV)-lowest/constraints.txt 'transformers==5.20.0' -e '.[demo]' pytest pytest-xdist
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/pytest -n $(WORKERS) -m 'not full' tests/test_contract.py tests/test_surgery.py

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/basedpyright
	$(BIN)/python docs/generate.py --check
	@wc -l $$(git ls-files 'src/*.py') | awk '$$1 > 400 && $$2 != "total" {print "advice: over 400 lines: " $$2 " (" $$1 ")"}'

contract: $(VENV)/test  ## run the contract of every method and note it in the docs
	OMP_NUM_THREADS=1 $(BIN)/python docs/generate.py --contract

docs: $(VENV)/test  ## regenerate the generated parts of README and docs
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) runs report.html figures
