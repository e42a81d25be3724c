# Needs python3 (3.11 or newer), make, sh, coreutils; everything else is installed into a virtual environment.
# `make` alone lists the targets.  PYTHON=python3.12 chooses the interpreter; each choice has its own environment.

PYTHON  ?=
CONFIG  ?= config.toml
JOBS    ?= 6
RUNS    ?= 100000
SEED    ?=
ARGS    ?=
ifeq ($(PYTHON),)
VENV    ?= .venv
else
VENV    ?= build/venv-$(subst /,-,$(PYTHON))
endif

BOOKS   := telemt.py telemt_api.py
STAMP   := $(VENV)/.dev-extras-installed
PY      := $(VENV)/bin/python
FIND    := sh tools/pythons.sh
SHELL   := /bin/sh

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help run venv deps-test test check lint types house fuzz laws soak kills bench bench-check docs dist release-check install uninstall deploy rollback test-all clean

help: ## list the targets
	@while IFS= read -r line; do \
		case "$$line" in [a-z]*:*'## '*) printf '  make %-13s %s\n' "$${line%%:*}" "$${line##*## }";; esac; \
	done < Makefile

run: ## start the proxy with CONFIG=config.toml; installs nothing
	@python=$$($(FIND) pick "$(PYTHON)") && exec "$$python" telemt.py "$(CONFIG)" $(ARGS)

venv: $(STAMP) ## create the virtual environment with the dev extras

$(STAMP): pyproject.toml
	@python=$$($(FIND) pick "$(PYTHON)") && \
	if ! "$(PY)" -c '' 2>/dev/null; then \
		echo "creating $(VENV) with $$python"; \
		"$$python" -m venv --clear "$(VENV)" || { echo "no venv module? on Debian: apt-get install python3-venv" >&2; exit 1; }; \
	fi
	@"$(PY)" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["dev"], sep="\n")' > "$(VENV)/dev-extras.txt"
	"$(PY)" -m pip install --quiet --upgrade -r "$(VENV)/dev-extras.txt"
	@touch "$@"

deps-test: ## install what only the tests need (nginx, haproxy ...) by apt; without root or network it says so and goes on
	@sh tools/deps_test.sh

test: $(STAMP) ## run every test, JOBS=6 side by side (they mostly wait); ARGS='-k word' narrows
	"$(PY)" -m pytest -n $(JOBS) --dist worksteal $(ARGS)

check: lint types house test ## all that CI asks: lint, types, house, test

lint: $(STAMP) ## ruff over all Python files
	"$(PY)" -m ruff check

types: $(STAMP) ## mypy --strict over the program and the tools
	"$(PY)" -m mypy

house: ## compare the section map with the code, and the other rules of the house
	@python=$$($(FIND) pick "$(PYTHON)") && "$$python" -B tools/house_check.py $(ARGS) $(BOOKS)

fuzz: $(STAMP) ## mutate the input of every parser, RUNS=100000 times each or MINUTES=10 in all (then with atheris too); ARGS='--target NAME'
	"$(PY)" tools/fuzz.py $(if $(MINUTES),--minutes $(MINUTES),--runs $(RUNS)) $(if $(SEED),--seed $(SEED)) $(ARGS)
	SCHEMATHESIS_EXAMPLES=300 "$(PY)" -m pytest -q tests/journeys/test_api_contract.py -k schemathesis

bench: $(STAMP) ## measure against bare loops and write docs/performance.md; goes on after an interruption; QUICK=1: two minutes, writes nothing
	"$(PY)" tools/bench_all.py $(if $(QUICK),--quick) $(ARGS)

docs: ## write docs/configuration.md and docs/api.md from the tables in the code; ARGS=--check only compares
	@python=$$($(FIND) pick "$(PYTHON)") && PYTHONPATH=. "$$python" -B tools/make_docs.py $(ARGS)

bench-check: $(STAMP) ## exit 1 where a ratio is worse than the committed table by a quarter, twice in a row
	"$(PY)" tools/bench.py --check $(ARGS)

laws: $(STAMP) ## property tests with the big hypothesis profile
	HYPOTHESIS_PROFILE=big "$(PY)" -m pytest -n $(JOBS) tests/laws $(ARGS)

soak: $(STAMP) ## the program in a crowd that misbehaves, MINUTES=10 or HOURS=; first it has to find planted leaks; ARGS=--write
	"$(PY)" tools/soak.py --prove
	"$(PY)" tools/soak.py $(if $(HOURS),--hours $(HOURS),--minutes $(or $(MINUTES),10)) $(if $(SEED),--seed $(SEED)) $(ARGS)

kills: $(STAMP) ## 300 kills of the program and 3,000 of the store in the middle of changes
	TELEMT_KILLS=300 TELEMT_STORE_KILLS=3000 "$(PY)" -m pytest tests/journeys/test_changes.py -k kill -o faulthandler_timeout=0 $(ARGS)

dist: ## write dist/: telemt.pyz (both books in one file), the books, the source, SHA256SUMS; the same bytes everywhere
	@python=$$($(FIND) pick "$(PYTHON)") && "$$python" -B tools/make_dist.py $(ARGS)

# What is written on the command line, PREFIX=/usr and the like, is in the environment of the tools.
INSTALL = PYTHON="$$([ -z "$(PYTHON)" ] || $(FIND) pick "$(PYTHON)")" sh tools/install.sh

release-check: ## what is missing for a release: version, CHANGELOG, documents, clean tree, reproducible dist; exit 1 names it
	@python=$$($(FIND) pick "$(PYTHON)") && "$$python" -B tools/release_check.py

install: ## install into PREFIX=/usr/local (below DESTDIR=), with units and a first configuration; never overwrites one
	@$(INSTALL) install

uninstall: ## take away what install brought; the configuration stays
	@$(INSTALL) uninstall

deploy: ## bring this version to HOST=root@server: check there, switch, health check, back if it fails (tools/deploy.sh)
	@sh tools/deploy.sh deploy "$(HOST)"

rollback: ## bring the version before the last deploy back to HOST=root@server
	@sh tools/deploy.sh rollback "$(HOST)"

test-all: ## the tests on every CPython 3.11-3.14 found (PATH, pyenv, uv), each in build/venv-VERSION
	@mkdir -p build; $(FIND) all > build/pythons.txt; cat build/pythons.txt; failed=; \
	while read -r version python; do \
		echo "== CPython $$version"; \
		$(MAKE) --no-print-directory test PYTHON="$$python" VENV="build/venv-$$version" < /dev/null || failed="$$failed $$version"; \
	done < build/pythons.txt; \
	[ -s build/pythons.txt ] || { echo "no CPython 3.11 or newer found" >&2; exit 1; }; \
	[ -z "$$failed" ] || { echo "failed on:$$failed" >&2; exit 1; }

clean: ## remove environments, caches and build results
	rm -rf .venv build .hypothesis .mypy_cache .pytest_cache .ruff_cache dist telemt_py.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
