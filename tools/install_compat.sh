#!/usr/bin/env bash
# Install the older transformers that exported folders must also work under, beside the environment, into .compat/transformers-4.57.
# Tests put that folder on PYTHONPATH of a child process; nothing in the environment itself changes.
# Usage: tools/install_compat.sh [VENV]   (default .venv)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:-.venv}
lock=requirements/transformers-4.57.txt
target=.compat/transformers-4.57

works() {
  PYTHONPATH=$target "$venv/bin/python" -c \
    'import transformers, sys; from transformers import Qwen3ForCausalLM; sys.exit(not transformers.__version__.startswith("4.57."))'
}

if cmp --silent "$lock" "$target/lock.txt" && works >/dev/null 2>&1; then
  echo "== $target: transformers 4.57 is there"
  exit 0
fi
echo "== $target: the older transformers that exports are tested against too"
rm -rf "$target.tmp" "$target"
# --no-deps: the lock file holds all that differs from the environment; torch, numpy and the rest come from there
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$target.tmp" --requirement "$lock"
cp "$lock" "$target.tmp/lock.txt"
mv "$target.tmp" "$target"
works || { echo "error: transformers 4.57 in $target does not import; its own message is above" >&2; exit 4; }
