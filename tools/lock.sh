#!/usr/bin/env bash
# Write the lock files anew, with the newest releases inside pyproject.toml's ranges; run through `make lock`.
#   requirements/cpu-py311.txt, cpu-py312.txt     what `make install` installs on a machine without an NVIDIA GPU
#   requirements/cuda-py311.txt, cuda-py312.txt   the same with one: also the gpu extra, and the CUDA libraries that torch needs
#   requirements/transformers-4.57.txt            the older transformers, installed beside the environment
#   requirements/lm-eval.txt                      the eval extra, beside the environment, without libraries of single tasks
# They are for Linux on x86-64. They hold no hashes: builds of one torch release for the CPU and for CUDA differ, and which of them pip
# finds depends on the index it uses. The resolver is uv, in an environment of its own.
# Before every new lock: `make test-newest`. After it: `make test`.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/find_python.sh

python=$(find_python) || { echo "error: Python 3.11 or 3.12 is needed; set PYTHON=/path/to/python" >&2; exit 4; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/new"
"$python" -m venv "$work/uv"
"$work/uv/bin/python" -m pip install --quiet --disable-pip-version-check 'uv>=0.9'

resolve() { # PYTHON_VERSION ARGS...: package==version, a line each
  "$work/uv/bin/uv" pip compile --quiet --no-config --python-version "$1" --python-platform x86_64-manylinux_2_28 \
    --no-header --no-annotate "${@:2}"
}

write() { # FILE WHAT: standard input below a line that says what it is
  { echo "# $2. Made by \`make lock\`; do not edit."; cat; } >"$work/new/$1"
}

for version in 3.11 3.12; do
  short=py${version/./}
  resolve $version pyproject.toml requirements/build.in --extra dev --extra docs --extra trackers --extra gguf --extra gpu | write "cuda-$short.txt" "Python $version with CUDA"
  # the same versions without what only CUDA needs: a CPU build of torch has none of it, and another build pins it by itself
  grep -vE '^(#|nvidia-|cuda-)' "$work/new/cuda-$short.txt" >"$work/shared"
  resolve $version pyproject.toml requirements/build.in --extra dev --extra docs --extra trackers --extra gguf --constraint "$work/shared" |
    grep -vE '^(nvidia-|cuda-)' | write "cpu-$short.txt" "Python $version without CUDA"
done

# one file for both Pythons: what differs from the environment, or is not in it
grep '==' "$work/new/cpu-py311.txt" | grep -vE '^(transformers|huggingface-hub|tokenizers)==' >"$work/shared"
resolve 3.11 requirements/transformers-4.57.in --constraint "$work/shared" |
  grep -vxFf "$work/new/cpu-py311.txt" | write transformers-4.57.txt "transformers 4.57 beside the environment"

skip='^(aio[a-z]*|attrs|cloudpickle|defusedxml|evaluate|frozenlist|joblib|multidict|narwhals|nltk|propcache|rouge-score|scikit-learn|scipy'
skip+='|sqlitedict|threadpoolctl|word2number|yarl|nvidia-[a-z0-9-]*|cuda-[a-z0-9-]*)=='
grep '==' "$work/new/cpu-py311.txt" >"$work/shared"
resolve 3.11 pyproject.toml --extra eval --constraint "$work/shared" |
  grep -vxFf "$work/new/cpu-py311.txt" | grep -vE "$skip" | write lm-eval.txt "lm-eval beside the environment"

# all of them at the end: a resolution that fails leaves the old files as they are
for file in "$work"/new/*; do
  name=${file##*/}
  if cmp --silent "$file" "requirements/$name"; then change="as before"; else change="changed: see git diff"; fi
  cp "$file" "requirements/$name"
  echo "requirements/$name: $(grep -c '==' "$file") packages, $change"
done
