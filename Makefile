# Everything runs in $(VENV), built from requirements.lock. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
SIZE ?= default
WORKERS ?= 2
OUT ?= _build/gpu
ENCODER ?= minilm
CHROMIUM ?= chromium
CORE := torch safetensors jaxtyping tqdm numpy filelock huggingface-hub platformdirs
SIZES := smoke default full
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete

# Idle OpenMP threads yield: on a busy machine that makes training four times faster.
export OMP_WAIT_POLICY = PASSIVE
export TOKENIZERS_PARALLELISM = false
export HF_HUB_DISABLE_TELEMETRY = 1

.DEFAULT_GOAL := help
.PHONY: help install book pdf test test-colab test-core test-exercises test-pages test-peers test-scale gpu lab check lint clean distclean size

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)  ## make the environment alone

book: size $(STAMP)  ## run the notebooks and build the HTML book (SIZE=smoke, default or full)
	$(BIN)/python -m divmerge_book book --size $(SIZE)

test: $(STAMP)  ## run the tests, in WORKERS=2 processes
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-peers: _build/peers/.complete  ## compare with other packages, installed in an environment of their own
	_build/peers/bin/python -m pytest tests/*/test_peers*.py tests/book/test_kernel_benchmarks.py

test-scale: _build/scale/.complete  ## several processes and a local Ray cluster, in an environment of their own
	_build/scale/bin/python -m pytest -m scale

test-core:  ## the core in an environment with only its own dependencies
	$(PYTHON) -m venv --clear _build/core
	_build/core/bin/python -m pip install --disable-pip-version-check -c requirements.lock $(CORE) 'setuptools>=77'
	_build/core/bin/python -m pip install --disable-pip-version-check --no-build-isolation --no-deps .
	cd _build/core && bin/python ../../tests/core/core_alone.py

# Environments beside $(VENV), each with an extra of its own.
_build/peers/.complete: EXTRA := peers
_build/scale/.complete: EXTRA := cluster
_build/peers/.complete _build/scale/.complete: requirements.lock pyproject.toml
	@rm -f $@
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check -r requirements.lock
	$(@D)/bin/python -m pip install --disable-pip-version-check --no-build-isolation -e '.[$(EXTRA),triton]'
	@touch $@

test-colab: $(STAMP)  ## run notebooks on a machine like Colab's, from the notebook file alone (slow)
	$(BIN)/python -m pytest -m colab -rs tests/book/test_colab.py

test-pages: book  ## open every page in Chromium, wide and narrow, light and dark (best with SIZE=smoke)
	npm install --silent --no-fund --no-audit --prefix _build/axe axe-core@4.14.1
	$(BIN)/python -m pytest -m browser -rs tests/book/test_interactive.py tests/book/test_pages.py

pdf: book  ## print the chapters of the part Learn to _build/pdf, by the browser's print style (needs Chromium)
	@mkdir -p _build/pdf
	for page in _build/html/notebooks/0[0-4]_*.html; do \
	  $(CHROMIUM) --headless --no-sandbox --no-pdf-header-footer --virtual-time-budget=60000 \
	    --allow-file-access-from-files --print-to-pdf=_build/pdf/$$(basename $$page .html).pdf "file://$(CURDIR)/$$page" || exit 1; done

test-exercises: $(STAMP)  ## run every exercise that changes a parameter, at size smoke
	$(BIN)/python -m pytest -m exercise tests/book/test_exercises.py

# Without $(VENV), whose PyTorch may see no GPU: PYTHON is one that does and has requirements.lock's other packages.
gpu:  ## measure what fits into eight minutes of a GPU, without network (OUT=FOLDER ENCODER=FOLDER PYTHON=...)
	PYTHONPATH=.:book $(PYTHON) -m divmerge_book.runner.gpu $(OUT) --encoder $(ENCODER)

lab: $(STAMP)  ## open JupyterLab on the notebooks
	$(BIN)/python -m jupyterlab notebooks

check: lint test  ## everything a change must pass: style, stripped notebooks, tests, smoke book
	$(MAKE) book SIZE=smoke

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	@set -- notebooks/*.ipynb; test ! -e "$$1" || $(BIN)/nbstripout --verify --keep-id \
	  --extra-keys "metadata.papermill cell.metadata.papermill cell.metadata.execution" "$$@"

clean:  ## remove the built book and the tools' caches, but no expert and no asset
	rm -rf _build .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find divmerge_core tests notebooks -name __pycache__ -prune -exec rm -rf {} +
	find notebooks -name .ipynb_checkpoints -prune -exec rm -rf {} +

distclean: clean  ## the same, and the virtual environment
	rm -rf $(VENV)

size:
	@case " $(SIZES) " in *" $(SIZE) "*) ;; \
	  *) echo "SIZE must be one of: $(SIZES); got '$(SIZE)'" >&2; exit 2;; esac

# The stamp is written last; what an interrupted installation left behind is cleared.
$(STAMP): requirements.lock pyproject.toml
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, '$(PYTHON)' is $$($(PYTHON) --version 2>&1);" \
	    "try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@test ! -e $(VENV)/.installing && $(BIN)/python -m pip --version >/dev/null 2>&1 || \
	  $(PYTHON) -m venv --clear $(VENV)
	@touch $(VENV)/.installing
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile -r requirements.lock
	@# pip compiles on one core; a few packages hold templates that are no Python and fail here.
	@$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
	$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation -e '.[triton]'
	@$(BIN)/python -m compileall -qq -j 0 divmerge_core book/divmerge_book
	@touch $@ && rm $(VENV)/.installing
