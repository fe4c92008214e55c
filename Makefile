# make install | test | test-gpu | lint | demo | clean. Each can be repeated: install runs again only when pyproject.toml or its script
# changed.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# two workers suit the two cores of CI; whole files go to one worker, so that expensive module fixtures are built once
PYTEST_ARGS ?= -n 2 --dist loadfile

.PHONY: install test test-gpu lint demo clean

install: $(STAMP)

$(STAMP): pyproject.toml tools/install.sh $(wildcard tools/install_compat.sh)
	bash tools/install.sh $(VENV)
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

# kernels and CUDA graphs on this machine's GPU; `make test` runs on the CPU everywhere
test-gpu: install
	HYPENET_TEST_GPU=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/unit

demo: install
	$(BIN)/hypenet demo

clean:
	rm -rf $(VENV) .compat build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find megatron_hypenet tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
