# make demo    install into .venv and run the demo
# make test    install into .venv and run every check: ruff, pyright, pytest
# make clean   remove .venv and what the tools cache
#
# Needs Python >= 3.10 (with venv) and make. PYTHON=python3.12 chooses another Python. TORCH is what
# pip installs first, so that nothing later chooses a build of PyTorch; it may carry pip options.

TORCH ?= torch==2.13.0
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' \
	2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet

.PHONY: demo test clean

demo: .venv/.demo
	$(BIN)/sae-whiten demo

# One thread for each process: on small matrices the threads of two pytest workers only get in each
# other's way. Pyright's wrapper would otherwise ask its registry for a newer version at every start.
test: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

.venv/.torch:
	@test -n "$(PYTHON)" || { \
		echo "No Python >= 3.10 with the venv module found: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	touch $@

.venv/.demo: .venv/.torch pyproject.toml
	$(PIP) --editable '.[demo]'
	touch $@

.venv/.dev: .venv/.torch pyproject.toml
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
