#!/usr/bin/env bash
# Install the older transformers that exported folders must also work under, beside the environment, into .compat/transformers-4.57.
# Tests put that folder on PYTHONPATH of a child process; nothing in the environment itself changes.
# Usage: tools/install_compat.sh [VENV]   (default .venv)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:-.venv}
lock=requirements/transformers-4.57.txt
target=.compat/transformers-4.57

works() { PYTHONPATH=$target "$venv/bin/python" -c 'import transformers, sys; from transformers import Qwen3ForCausalLM; sys.exit(not transformers.__version__.startswith("4.57."))' >/dev/null 2>&1; }

if cmp --silent "$lock" "$target/lock.txt" && works; then
  echo "transformers 4.57 is already in $target"
  exit 0
fi
rm -rf "$target.tmp" "$target"
# --no-deps: the lock file holds all that differs from the environment; torch, numpy and the rest come from there
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$target.tmp" --requirement "$lock"
cp "$lock" "$target.tmp/lock.txt"
mv "$target.tmp" "$target"
works || { echo "error: transformers 4.57 in $target does not import; remove the folder and run $0 again" >&2; exit 4; }
echo "transformers 4.57 is in $target"
