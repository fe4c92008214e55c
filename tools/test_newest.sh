#!/usr/bin/env bash
# Run the tests that touch other libraries with other releases than the locked ones; through `make test-newest`, before every new lock.
#   1. the newest releases inside pyproject.toml's ranges, torch as locked, in an environment of its own (.venv-newest, made anew each time)
#   2. the older transformers in place of the locked one
# It is no part of `make test`: what it finds is about releases that nobody has locked yet.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/find_python.sh
newest=.venv-newest

# what reads or calls transformers, tokenizers, safetensors, sentencepiece, Megatron-core, DeepSpeed, pydantic, typer, TensorBoard, Triton
library_facing=(
  tests/golden tests/integration/test_megatron_interchange.py tests/integration/test_bundled_teacher.py
  tests/unit/checkpoint tests/unit/cli tests/unit/config tests/unit/data tests/unit/eval tests/unit/export tests/unit/model
  tests/unit/engine/deepspeed/test_engine.py tests/unit/training/test_loop.py tests/unit/training/test_metrics.py tests/unit/training/test_schedule.py
  tests/unit/ops tests/distributed/test_tensor_parallel.py tests/distributed/test_checkpoint_layouts.py
)
of_transformers=(tests/golden tests/unit/export tests/unit/data tests/unit/cli/test_convert.py tests/unit/cli/test_data.py)

run() { # WHAT VENV TESTS...
  echo "== $1"
  OMP_NUM_THREADS=1 "$2/bin/python" -m pytest ${PYTEST_ARGS:--n 2 --dist loadfile} "${@:3}" || failed+=("$1")
}

failed=()
rm -rf "$newest"
LOCK=newest bash tools/install.sh "$newest"
version=$(python_version "$newest/bin/python")
differ=$("$newest/bin/python" -m pip --disable-pip-version-check freeze --all --exclude-editable | sed 's/+.*//' | tr 'A-Z_' 'a-z-' |
  grep -vxFf "requirements/cpu-py${version/./}.txt" | tr '\n' ' ') || true
run "the newest releases; they differ from the lock in: ${differ:-nothing}" "$newest" "${library_facing[@]}"

older=$PWD/.compat/transformers-4.57
found=$(PYTHONPATH=$older .venv/bin/python -c 'import transformers; print(transformers.__version__)')
PYTHONPATH=$older run "transformers $found" .venv "${of_transformers[@]}"

if [ ${#failed[@]} -gt 0 ]; then
  printf 'error: tests failed with %s\n' "${failed[@]}" >&2
  exit 1
fi
