#!/usr/bin/env bash
# Fetch the Python packages that a machine with CUDA, torch and transformers, but without a network, lacks: wheels for Python 3.12, of the
# versions in requirements/cuda-py312.txt.   tools/evidence/wheels.sh OUT [NAME...]
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:?usage: tools/evidence/wheels.sh OUT [NAME...]}
shift
names=("$@")
[ ${#names[@]} -gt 0 ] || names=(annotated-types fla-core flash-linear-attention gguf hjson megatron-core pydantic pydantic-core
  typer typing-inspection zstandard deepspeed)
pip=(.venv/bin/python -m pip --disable-pip-version-check)
platforms=()
for n in 35 34 31 28 27 24 17; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64)
mkdir -p "$out"

for name in "${names[@]}"; do
  spec=$(grep -E "^$name==" requirements/cuda-py312.txt) || { echo "error: $name is not in requirements/cuda-py312.txt" >&2; exit 2; }
  if [ "$name" = deepspeed ]; then # published as source only; its operations compile where they are used
    DS_BUILD_OPS=0 "${pip[@]}" wheel --quiet --no-deps --no-build-isolation --wheel-dir "$out" "$spec"
  else
    "${pip[@]}" download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" --dest "$out" "$spec"
  fi
done
du -csh "$out"/*.whl
