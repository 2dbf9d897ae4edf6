# Every target sets up what it needs, in virtual environments inside this folder: `make demo` and `make test` are all
# that a fresh machine with Python needs. Another Python: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
CORE_VENV ?= .venv-core
USB_VENV ?= .venv-usb

BIN := $(VENV)/bin
CORE_BIN := $(CORE_VENV)/bin
USB_BIN := $(USB_VENV)/bin
PIP_INSTALL := -m pip install --disable-pip-version-check $(if $(CI),--quiet)

# torchvision does not run beside a CPU-only torch, so the core tests get an environment without it, and with it the
# proof that the library needs nothing else.
CORE_TORCH := torch==2.13.0

# What semilearn requires for text, audio and trackers is 5 GB on its own and no part of what is tested: the tests put
# stand-ins there. All of it, with the torch that goes with it: pip install '.[usb,test]' into a new environment.
USB := semilearn==0.3.2 progress ruamel.yaml

# Sums, derivatives and graphs of every module and operator, and what the library replaces or borrows in torch.
BY_TORCH := exactness conditions operators second_derivatives hazards ghost_hazards precision normalization isolation wrapper layout

# One process a core; each takes from the other's list when its own is done.
PYTEST := -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal --durations 25 --durations-min 4

MAKEFLAGS += --no-print-directory
.PHONY: help demo test test-core test-torch test-usb lint format types docs setup setup-core setup-usb clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: setup ## train supervised, FixMatch and FixMatch + GGCR on embedded digits (no network, minutes)
	@$(BIN)/python examples/demo.py

test: setup ## all tests
	@$(BIN)/python $(PYTEST)

test-core: setup-core ## tests/core against the installed wheel, with torch 2.13 and nothing else
	@$(CORE_BIN)/python $(PIP_INSTALL) --force-reinstall --no-deps .
	@$(CORE_BIN)/python $(PYTEST) tests/core

test-torch: setup-core ## of test-core, what another torch could break: all that .ci/run takes of it
	@$(CORE_BIN)/python $(PIP_INSTALL) --force-reinstall --no-deps .
	@$(CORE_BIN)/python $(PYTEST) $(foreach name,$(BY_TORCH),$(wildcard tests/core/test_$(name).py tests/core/*/test_$(name).py))

test-usb: setup-usb ## tests/usb against semilearn 0.3.2, on top of the environment of `make test`
	@$(USB_BIN)/python -m pytest tests/usb

lint: setup ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: setup ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: setup ## mypy
	@$(BIN)/python -m mypy

docs: setup ## the site, strictly, into site/
	@$(BIN)/python -m mkdocs build --strict
	@touch site/.strict  # tests/docs/test_site.py then looks at this one

setup: $(VENV)/.ready
setup-core: $(CORE_VENV)/.ready
setup-usb: $(USB_VENV)/.ready

# The stamp says which Python made an environment, and where: with another of either, the environment is made anew. The
# stamp goes first and comes back last, so that an interrupted set-up leaves none, and the next one starts from an empty
# folder instead of trusting half-written packages. Where only pyproject.toml is newer, pip changes what differs.
ORIGIN := $(shell $(PYTHON) -c 'import os, sys; print(sys.version.split()[0], os.getcwd())' 2>/dev/null)
made_here = $(shell test "$$(cat $(1)/.ready 2>/dev/null)" = "$(ORIGIN)" && echo yes)

define start_environment
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	echo "gradconsist needs Python 3.10 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 | head -n 1)"; \
	echo "Name another one, for example: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
@if [ "$(call made_here,$(1))" ]; then rm $(1)/.ready; else $(PYTHON) -m venv --clear $(1); fi
endef

$(VENV)/.ready: pyproject.toml $(if $(call made_here,$(VENV)),,FORCE)
	$(call start_environment,$(VENV))
	@echo "Setting up $(VENV): PyTorch and its CUDA libraries take about 5 GB of disk and a few minutes."
	@$(BIN)/python $(PIP_INSTALL) --editable '.[dev,docs]'
	@echo '$(ORIGIN)' > $@

$(CORE_VENV)/.ready: pyproject.toml $(if $(call made_here,$(CORE_VENV)),,FORCE)
	$(call start_environment,$(CORE_VENV))
	@echo "Setting up $(CORE_VENV)."
	@$(CORE_BIN)/python $(PIP_INSTALL) '$(CORE_TORCH)' .
	@# Isolated and before the test tools arrive: what imports here imports for every user.
	@$(CORE_BIN)/python -I -c 'import gradconsist; print("gradconsist", gradconsist.__version__, "imports with torch alone")'
	@$(CORE_BIN)/python $(PIP_INSTALL) '$(CORE_TORCH)' '.[test]'
	@echo '$(ORIGIN)' > $@

$(USB_VENV)/.ready: $(VENV)/.ready $(if $(call made_here,$(USB_VENV)),,FORCE)
	$(call start_environment,$(USB_VENV))
	@echo "Setting up $(USB_VENV)."
	@packages='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		echo "import site; site.addsitedir('$$($(BIN)/python -c "$$packages")')" \
		> "$$($(USB_BIN)/python -c "$$packages")/base.pth"
	@$(USB_BIN)/python $(PIP_INSTALL) --no-deps $(USB)
	@echo '$(ORIGIN)' > $@

FORCE:

clean: ## remove environments, caches, the built site; keep runs/ and data/
	rm -rf $(VENV) $(CORE_VENV) $(USB_VENV) site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
