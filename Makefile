# `make demo` and `make test` are all a newcomer needs; both make their own environment.
# The newest Python that TensorFlow has wheels for and that can make environments (Debian has that in
# a package of its own); `make demo PYTHON=...` takes another.
ifndef PYTHON
PYTHON := $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	2>/dev/null && echo $$python && break; done)
endif
define SAY_PYTHON
@test -n "$(PYTHON)" || { echo "There is no Python from 3.11 to 3.13 here, with venv (looked for:" \
	"python3.13, python3.12, python3.11, python3). Install one, or name it: make PYTHON=..."; exit 1; }
@echo "Python: $(PYTHON), $$($(PYTHON) --version)"
endef
VENV := .venv
BIN := $(VENV)/bin
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: demo test test-all test-oldest evidence evidence-quick bench bench-quick bench-record
.PHONY: bench-peers gpu-check chaos docs lint format clean

demo: $(VENV)/installed-examples
	$(BIN)/python examples/digits_three_ways.py $(ARGS)

test: $(VENV)/installed-all lint
	$(BIN)/python -m pytest $(ARGS)

# With the tests that `make test` leaves out for their time.
test-all: $(VENV)/installed-all lint
	$(BIN)/python -m pytest -m "slow or not slow" $(ARGS)

# The oldest supported TensorFlow and Keras, in an environment of their own.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest $(ARGS)

# Block momentum against its rivals, each at its best rate: docs/evidence.md. Hours on 2 cores; it
# goes on where it was stopped. One study: make evidence ARGS="--study images".
evidence: $(VENV)/installed-evidence
	$(BIN)/python benchmarks/evidence.py $(ARGS)

# Each of its studies in small, into runs/evidence-quick.
evidence-quick: $(VENV)/installed-evidence
	$(BIN)/python benchmarks/evidence.py --quick $(ARGS)

# Speed over links of several speeds (between network namespaces, as root), into runs/bench.
# DEVICE=gpu: one GPU for each worker. Peers that need more come with `make bench-peers`.
DEVICE ?= cpu
PEERS := $(wildcard .venv-peers/bin/python)

bench: $(VENV)/installed-bench
	$(BIN)/python benchmarks/speed.py --device $(DEVICE) $(PEERS:%=--peers-python %) $(ARGS)

# All of it, kept in benchmarks/records with machine and versions; docs' tables are made of it.
bench-record: ARGS += --record
bench-record: bench

bench-quick: ARGS += --quick
bench-quick: bench

# What benchmarks/peers compare with, in an environment of their own (PyTorch: gigabytes).
bench-peers:
	$(SAY_PYTHON)
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check \
		-r benchmarks/peers/requirements.txt

# Everything that a GPU can change, checked and measured in ten minutes; into runs/gpu-check.
gpu-check: $(VENV)/installed-examples
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

# Twenty random kills over a small job; some minutes.
chaos: $(VENV)/installed-examples
	$(BIN)/python benchmarks/chaos.py $(ARGS)

# The docs as a site, in the folder site. Warnings are errors.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)
	@echo "Open site/index.html; with search: python3 -m http.server --directory site"

lint: $(VENV)/installed-all
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini

format: $(VENV)/installed-all
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/bin/python:
	$(SAY_PYTHON)
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-%: $(VENV)/bin/python setup.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$*]"
	touch $@

.venv-oldest/installed: setup.py
	$(SAY_PYTHON)
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -e ".[all]" \
		"tensorflow==2.20.*" "keras==3.12.*"
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest build site *.egg-info
