# Plaudit. `make serve` and `make test` do all the set-up they need.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN    := .venv/bin
ARGS   ?=

export OMP_WAIT_POLICY ?= passive
export HF_HUB_DISABLE_TELEMETRY ?= 1
export GRADIO_ANALYTICS_ENABLED ?= False

.PHONY: help venv serve test test-fast lint format bench peers chromium clean

help:                  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 22

venv: .venv/.done      ## build .venv with the pinned dependencies

.venv/.done: pyproject.toml constraints.txt setup.py engine/decode.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Plaudit needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "could not make .venv: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

serve: venv            ## start Plaudit on http://127.0.0.1:7860  (ARGS="--model ... --port ...")
	@$(BIN)/plaudit serve $(ARGS)

test: venv chromium    ## the whole test suite  (ARGS="-k name" to pick)
	$(BIN)/python -m pytest $(ARGS)

test-fast: venv        ## without the slow and the browser tests
	$(BIN)/python -m pytest -m "not slow and not browser" $(ARGS)

lint: venv             ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

format: venv           ## sort imports and apply ruff's safe fixes
	$(BIN)/ruff check --fix .

bench: venv $(if $(PLAUDIT_PEERS),,peers)  ## fifteen benchmarks, under 40 minutes; the long ones run by themselves  (ARGS="--only engine")
	@$(BIN)/python -m benchmarks.suite $(ARGS)

peers: .venv-peers/.done  ## build .venv-peers with TRL and llama.cpp, for the benchmarks against them

.venv-peers/.done: benchmarks/peers.txt constraints.txt
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r benchmarks/peers.txt
	@touch $@

chromium:              # for the browser tests; they skip, saying so, where it cannot be had
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    { echo "installing chromium for the browser tests ..."; \
	      apt-get update -qq >/dev/null 2>&1; DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null 2>&1; }; } || \
	  echo "no chromium here and no way to install it: the browser tests will be skipped"

clean:                 ## remove .venv, .venv-peers and caches; plaudit-data stays
	rm -rf .venv .venv-peers .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
