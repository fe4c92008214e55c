#!/usr/bin/env bash
# Run the tests that touch other libraries with other releases than the locked ones; through `make test-newest`, before every new lock.
#   1. the newest releases inside pyproject.toml's ranges, in an environment of its own (.venv-newest, made anew each time)
#   2. transformers 4.57 in place of the locked one
# All of it stays out of the way of `make test`: what it finds is about a release that nobody has locked yet.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-newest

# what reads or calls transformers, tokenizers, safetensors, sentencepiece, Megatron-core, DeepSpeed, pydantic, typer, TensorBoard, Triton
library_facing=(
  tests/golden tests/integration/test_megatron_interchange.py tests/integration/test_bundled_teacher.py
  tests/unit/checkpoint tests/unit/cli tests/unit/config tests/unit/data tests/unit/eval tests/unit/export tests/unit/model
  tests/unit/engine/test_deepspeed.py tests/unit/engine/test_loop.py tests/unit/engine/test_metrics.py tests/unit/engine/test_schedule.py
  tests/unit/ops tests/distributed/test_tensor_parallel.py tests/distributed/test_checkpoint_layouts.py
)
of_transformers=(tests/golden tests/unit/export tests/unit/data tests/unit/cli/test_convert.py tests/unit/cli/test_data.py)
run() { OMP_NUM_THREADS=1 "$1/bin/python" -m pytest ${PYTEST_ARGS:--n 2 --dist loadfile} "${@:2}"; }

status=0
rm -rf "$venv"
LOCK=newest bash tools/install.sh "$venv"
echo "== newest releases that differ from the lock:"
"$venv/bin/python" -m pip --disable-pip-version-check freeze --exclude-editable | tr _ - |
  grep -vixFf "requirements/cpu-$("$venv/bin/python" -c 'import sys; print("py%d%d" % sys.version_info[:2])').txt" || echo "none"
run "$venv" "${library_facing[@]}" || status=$?
echo "== transformers 4.57"
PYTHONPATH=$PWD/.compat/transformers-4.57 run .venv "${of_transformers[@]}" || status=$?
exit $status
