# Two commands do the work: `make repro` and `make test`. Both first bring .venv to the pins of requirements.lock.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Stages run `python -m distillery run ...`: the environment's own python must be the first that a shell finds.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export DVC_NO_ANALYTICS := 1
export HF_HUB_DISABLE_TELEMETRY := 1
unexport PYTHONHOME
unexport PYTHONPATH

.DEFAULT_GOAL := help
.PHONY: help repro recipe test lab report lock clean git

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

repro: $(VENV)/.installed ## run every stage that is out of date, up to reports/index.html
	@git rev-parse --git-dir >/dev/null 2>&1 || { echo "error: this folder is no git repository, and DVC needs one; run: git init" >&2; exit 1; }
	@python -m distillery check
	@dvc repro
	@$(MAKE) --no-print-directory report

test: $(VENV)/.installed ## every check: style, clean notebooks, tests
	@ruff check
	@ruff format --check
	@git ls-files -z 'notebooks/*.ipynb' | xargs -0 -r nbstripout --verify --keep-id --extra-keys metadata.language_info.version
	@OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 --dist loadfile

recipe: $(VENV)/.installed ## run a published system in a folder of its own: make recipe NAME=pkd-albert [SCALE=small]
	@python -m distillery recipe $(if $(NAME),'$(NAME)',$(error name a recipe: make recipe NAME=pkd-albert)) $(if $(SCALE),--scale '$(SCALE)')

lab: $(VENV)/.installed ## open the notebooks in JupyterLab
	@jupyter lab notebooks

report: ## where the report is
	@if [ -f reports/index.html ]; then echo "report: file://$(CURDIR)/reports/index.html"; \
	else echo "no report yet; run: make repro"; fi

lock: ## pin anew, from the newest versions that pyproject.toml allows, in an environment of its own
	@rm -rf .cache/lock
	@$(PYTHON) -m venv .cache/lock
	@.cache/lock/bin/python -m pip install -q -e '.[dev]'
	@{ sed -n '/^#/p' requirements.lock; .cache/lock/bin/python -m pip freeze -q --all --exclude-editable | \
	  sed 's/+[a-z0-9]*$$//' | grep -viE '^(pip|distillery|triton|nvidia-.*|cuda-.*)==' ; } > .cache/requirements.lock
	@mv .cache/requirements.lock requirements.lock
	@rm -rf .cache/lock
	@git diff --stat -- requirements.lock

clean: ## remove the environment, caches and what the stages wrote; committed reports and data/corpora stay
	rm -rf $(VENV) .cache build data/processed data/teacher data/augmented data/inputs runs
	rm -rf .pytest_cache .ruff_cache .hypothesis src/distillery.egg-info

git:
	@command -v git >/dev/null || { echo "error: git is not installed" >&2; exit 1; }

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON); name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot make environments; install its venv package (Debian: python3-venv)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# torch goes first: pip then takes its build for this machine, and the rest fits around it.
$(VENV)/.installed: requirements.lock pyproject.toml | git $(VENV)/bin/python
	@echo "installing the pins of requirements.lock into $(VENV) (minutes, the first time)"
	@$(BIN)/python -m pip install -q "$$(grep '^torch==' requirements.lock)" -c requirements.lock
	@$(BIN)/python -m pip install -q -r requirements.lock
	@$(BIN)/python -m pip install -q --no-deps -e .
	@touch $@
