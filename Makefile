# Two commands do the work: `make repro` and `make test`. Both first bring .venv to the pins of requirements.lock.
# Works with GNU make 3.81, which macOS has: it looks for the program of a simple line in its own PATH, not in the exported
# one, so every tool of the environment is named by its path.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := 0.13.9# what `make lock` resolves with

# Tests that run stages, DVC or a browser: minutes each. `make unit` leaves them out.
PIPELINE_TESTS := $(addprefix tests/test_,stage.py pipeline.py smoke_tasks.py errors.py readme.py recipe.py search.py \
  notebooks.py report.py finished_teacher.py)
# A process for each core, four at most for memory's sake, and in each one thread of torch; tests/conftest.py orders the files
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Stages run `python -m distillery run ...`: the environment's own python must be the first that their shell finds.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export DVC_NO_ANALYTICS := 1
export HF_HUB_DISABLE_TELEMETRY := 1
unexport PYTHONHOME
unexport PYTHONPATH

.DEFAULT_GOAL := help
.PHONY: help install repro recipe test lint style unit coverage pipeline gpu-check lessons study answers texts serve push lab report lock clean git

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## make .venv with everything, as the other commands do first

repro: $(VENV)/.installed ## run every stage that is out of date, up to reports/index.html
	@git rev-parse --git-dir >/dev/null 2>&1 || { echo "error: this folder is no git repository, and DVC needs one; run: git init" >&2; exit 1; }
	@$(BIN)/python -m distillery check
	@start=$$(date +%s); $(BIN)/dvc repro && $(BIN)/python -m distillery times --since $$start
	@$(MAKE) --no-print-directory report

# The type checker runs in the background while pytest runs; what it prints is shown if it fails.
test: style ## every check: style, imports, clean notebooks, types, tests
	@log=$$(mktemp); $(BIN)/basedpyright > $$log 2>&1 & types=$$!; trap 'kill $$types; rm -f $$log; exit 130' INT TERM; \
	$(PYTEST); code=$$?; wait $$types || { cat $$log; test $$code -ne 0 || code=1; }; rm -f $$log; exit $$code

lint: style ## the checks without tests
	@$(BIN)/basedpyright

style: $(VENV)/.installed
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/lint-imports --no-logo
	@git ls-files -z '*.ipynb' ':!reports' | xargs -0 $(BIN)/nbstripout --verify --keep-id --extra-keys metadata.language_info.version

unit: $(VENV)/.installed ## the tests that run no stage
	@$(PYTEST) $(addprefix --ignore=,$(PIPELINE_TESTS))

coverage: $(VENV)/.installed ## the tests that run no stage, and the lines that none of them runs; takes half as long again
	@$(PYTEST) $(addprefix --ignore=,$(PIPELINE_TESTS)) --cov=distillery --cov-report=term-missing:skip-covered

pipeline: $(VENV)/.installed ## the tests that run stages
	@$(PYTEST) $(PIPELINE_TESTS)

gpu-check: $(VENV)/.installed ## try every path that differs on a GPU, starting none after ten minutes: make gpu-check [MINUTES=10]
	@$(BIN)/python benchmarks/gpu_check.py --minutes '$(or $(MINUTES),10)'

recipe: $(VENV)/.installed ## run a published system in a folder of its own: make recipe NAME=pkd-albert [SCALE=small] [PLAN=1] [SETTINGS=1]
	@$(BIN)/python -m distillery recipe $(if $(NAME),'$(NAME)',$(error name a recipe: make recipe NAME=pkd-albert)) $(if $(SCALE),--scale '$(SCALE)') $(if $(PLAN),--plan $(if $(GPU),--gpu '$(GPU)')) $(if $(SETTINGS),--settings)

lessons: $(VENV)/.installed ## run the lessons in notebooks/lessons, minutes on a CPU, into reports/lessons
	@$(BIN)/python -m distillery lesson

study: $(VENV)/.installed ## show the results of a study, into reports/studies: make study NAME=phrasebank
	@$(BIN)/python -m distillery study $(if $(NAME),'$(NAME)',$(error name a study: make study NAME=phrasebank))

answers: $(VENV)/.installed ## ask the large models of data/answers again, hours and 6 GB of disk: make answers [NAME=finance-qwen]
	@$(BIN)/python -m distillery answers $(if $(NAME),'$(NAME)')

texts: $(VENV)/.installed ## let the large models of data/texts write again, a quarter of an hour and 6 GB of disk: make texts [NAME=finance-qwen]
	@$(BIN)/python -m distillery texts $(if $(NAME),'$(NAME)')

serve: $(VENV)/.installed ## serve a student over HTTP: make serve STUDENT=runs/tiny-kd-0 [PORT=8000]
	@$(BIN)/python -m distillery serve $(if $(STUDENT),'$(STUDENT)',$(error name a student: make serve STUDENT=runs/tiny-kd-0)) --port '$(or $(PORT),8000)'

push: $(VENV)/.installed ## upload a student with its card to a hub, private: make push STUDENT=tiny-kd-0 REPO=user/name [PUBLIC=1]
	@$(BIN)/python -m distillery push '$(if $(wildcard $(STUDENT)),$(STUDENT),runs/$(or $(STUDENT),$(error name a student: make push STUDENT=tiny-kd-0 REPO=user/name)))' $(if $(REPO),'$(REPO)',$(error name a repository: make push STUDENT=tiny-kd-0 REPO=user/name)) $(if $(PUBLIC),--public)

lab: $(VENV)/.installed ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab notebooks

report: ## where the report is
	@if [ -f reports/index.html ]; then echo "report: file://$(CURDIR)/reports/index.html"; \
	else echo "no report yet; run: make repro"; fi

# Resolved for every platform and Python version that pyproject.toml allows. `make lock KEEP=1` keeps the pins that there are.
lock: ## pin anew, with hashes, the newest versions that pyproject.toml allows
	@rm -rf .cache/lock
	@$(PYTHON) -m venv .cache/lock
	@.cache/lock/bin/python -m pip install -q uv==$(UV)
	@grep -h '^[a-z]' requirements.lock requirements-torch.lock | cut -d ' ' -f 1 > .cache/lock/pins
	@.cache/lock/bin/uv pip compile -q pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
	  --no-header --no-annotate --no-emit-index-url $(if $(KEEP),-c .cache/lock/pins) -o .cache/lock/all
	@{ sed -n '/^#/p' requirements.lock; awk \
	  '/^[a-z]/ { keep = $$0 !~ /^(torch|triton|nvidia-[^=]*|cuda-[^=]*)==/ } keep' .cache/lock/all; } > .cache/lock/hashed
	@{ sed -n '/^#/p' requirements-torch.lock; sed -n 's/^\(torch==[0-9.]*\).*/\1/p' .cache/lock/all; } > .cache/lock/torch
	@mv .cache/lock/hashed requirements.lock
	@mv .cache/lock/torch requirements-torch.lock
	@rm -rf .cache/lock
	@git diff --stat -- requirements.lock requirements-torch.lock

clean: ## remove the environment, caches and what the stages wrote; committed reports and data/corpora stay
	rm -rf $(VENV) .cache build data/processed data/teacher data/augmented data/inputs runs
	rm -rf .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage src/distillery.egg-info

git:
	@command -v git >/dev/null || { echo "error: git is not installed" >&2; exit 1; }

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON); name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot make environments; install its venv package (Debian: python3-venv)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# torch goes last: pip then takes its build for this machine, and finds the rest of what it needs installed.
$(VENV)/.installed: requirements.lock requirements-torch.lock pyproject.toml | git $(VENV)/bin/python
	@echo "installing the pins of requirements.lock into $(VENV) (minutes, the first time)"
	@$(BIN)/python -m pip install -q --no-deps --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install -q -r requirements-torch.lock
	@$(BIN)/python -m pip install -q --no-deps -e .
	@touch $@
