# make demo          install into .venv and run the demo
# make test          install into .venv and run every check: ruff, pyright, pytest
# make docs          install into .venv and build the site into site/
# make notebooks     run docs/notebooks and store what they print and draw
# make test-matrix   run pytest in an environment of its own for each entry of MATRIX: a Python and
#                    either the newest dependencies or the lowest that pyproject.toml allows.
#                    make test-3.12-newest runs one of them
# make test-probes   run the tests beside sae-probes, in .venv-probes: it needs pandas < 3 and brings
#                    xgboost (some 400 MB)
# make clean         remove the environments and what the tools cache
#
# Needs Python >= 3.10 (with venv) and make. PYTHON=python3.12 chooses another Python. TORCH is what
# pip installs first, so that nothing later chooses a build of PyTorch; it may carry pip options.
# The matrix looks for python3.10, python3.12 and so on; with pyenv, for example,
# PYENV_VERSION=3.11.7:3.10.13:3.12.1:3.13.0 make test-matrix. It takes the default build of PyTorch:
# several GB, once, as uv links what the environments share.

TORCH ?= torch==2.13.0
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' \
	2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet

MATRIX ?= 3.10-lowest 3.10-newest 3.12-newest 3.13-newest
WORKERS ?= 2
UV := .venv-matrix/uv/bin/uv

.PHONY: demo docs notebooks test test-matrix test-probes clean
.PRECIOUS: .venv-matrix/%/.dev

demo: .venv/.demo
	$(BIN)/sae-whiten demo

# Nothing in a page is loaded from another host.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	! grep -rnE '<(script|link|img|iframe)[^>]*(src|href)="?(https?:)?//' site --include='*.html'
	@echo "The site is in site/index.html; $(BIN)/mkdocs serve shows it while you write."

notebooks: .venv/.docs
	$(BIN)/python docs/run_notebooks.py

# One thread for each process: on small matrices the threads of two pytest workers only get in each
# other's way. Pyright's wrapper would otherwise ask its registry for a newer version at every start.
test: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile

# All of them, also when one fails.
test-matrix:
	$(MAKE) --no-print-directory --keep-going $(MATRIX:%=test-%)

test-probes: .venv-probes/.dev
	OMP_NUM_THREADS=1 .venv-probes/bin/pytest tests/evaluation/test_sae_probes.py

.venv-probes/.dev: pyproject.toml
	$(PYTHON) -m venv .venv-probes
	.venv-probes/bin/python -m pip install --quiet $(TORCH)
	.venv-probes/bin/python -m pip install --quiet --editable '.[dev,probes]'
	touch $@

test-%: .venv-matrix/%/.dev
	@$(UV) pip freeze --quiet --python $(<D) | grep -E '^(torch|sae-lens|transformer-lens|numpy)='
	OMP_NUM_THREADS=1 $(<D)/bin/pytest -n $(WORKERS) --dist loadfile

.venv-matrix/%/.dev: pyproject.toml | $(UV)
	$(UV) venv --quiet --clear --python python$(firstword $(subst -, ,$*)) $(@D)
	$(UV) pip install --quiet --python $(@D) --editable '.[dev]' \
		--resolution $(if $(filter %-lowest,$*),lowest-direct,highest)
	touch $@

$(UV):
	@test -n "$(PYTHON)" || { \
		echo "No Python >= 3.10 with the venv module found: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv .venv-matrix/uv
	.venv-matrix/uv/bin/python -m pip install --quiet uv

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

.venv/.docs: .venv/.torch pyproject.toml
	$(PIP) --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv .venv-matrix .venv-probes .pytest_cache .ruff_cache .hypothesis build dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
