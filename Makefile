# make demo and make test work in a fresh clone with nothing prepared; make help lists the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
BENCH_ARGS ?=
export PYTHON
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PIP_ROOT_USER_ACTION := ignore

CORE_SOURCES := $(wildcard kvmigrate/csrc/*.[ch] kvmigrate/csrc/*/*.h kvmigrate/guests/*.[Sh] kvmigrate/guests/*.ld) \
	kvmigrate/_build.py setup.py

.DEFAULT_GOAL := help
.PHONY: help deps deps-test build dev demo test test-hosts lint bench evidence docs clean

help: ## List what can be made
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS='	' read -r name text; \
	do printf '  make %-10s %s\n' "$$name" "$$text"; done

deps: ## Install the system packages that are missing (root, or sudo without a password)
	@./.ci/deps run

deps-test:
	@./.ci/deps test

# The pip inside a new environment may be older than pyproject.toml's keywords; it is only used to build.
$(VENV)/.built: pyproject.toml $(CORE_SOURCES) | deps
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@echo "building kvmigrate into $(VENV)"
	@$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.built
	@echo "installing the test tools into $(VENV)"
	@$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

build: deps $(VENV)/.built ## Build the C core and the guests, install kvmigrate into .venv

dev: build $(VENV)/.dev ## The same, with the test tools

demo: build ## Live-migrate a busy guest between two processes over TCP
	@$(BIN)/kvmigrate demo

lint: dev ## ruff and mypy --strict
	@$(BIN)/ruff check .
	@$(BIN)/mypy

test: deps-test dev lint ## Set up everything, run all tests
	@$(BIN)/pytest $(PYTEST_ARGS)

test-hosts: deps-test dev ## Move Linux a hundred times between two emulated hosts; takes hours
	@KVMIGRATE_HOPS=$${KVMIGRATE_HOPS:-100} $(BIN)/pytest tests/emulated/test_two_hosts.py $(PYTEST_ARGS)

bench: deps-test dev ## Measure against QEMU, beginning nothing after 17 minutes; writes docs/benchmarks
	@$(BIN)/python -m tests.bench $(BENCH_ARGS)

evidence: dev ## Plant every fault again and write the table of docs/evidence.md
	@KVMIGRATE_EVIDENCE=docs/evidence.md $(BIN)/pytest tests/planted

docs: dev ## Print the parts of docs/ that are made from code
	@$(BIN)/python -m kvmigrate.control.commands

clean: ## Remove what was built, .venv too
	@rm -rf $(VENV) build dist *.egg-info kvmigrate/_core.c kvmigrate/*.so kvmigrate/guests/*.elf
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
