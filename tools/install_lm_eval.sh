#!/usr/bin/env bash
# Install lm-eval for the tests of `hypenet eval --tasks` beside the environment, into .lm-eval: it brings 50 packages that nothing else
# here needs. Tests put that folder on the path of Python; nothing in the environment itself changes. By the name site-packages, tools such
# as Hypothesis know that it is code of others.
# Usage: tools/install_lm_eval.sh [VENV]   (default .venv)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:-.venv}
lock=requirements/lm-eval.txt
target=.lm-eval/site-packages

works() { PYTHONPATH=$target "$venv/bin/python" -c 'import lm_eval.evaluator'; }

if cmp --silent "$lock" "$target/lock.txt" && works >/dev/null 2>&1; then
  echo "== $target: lm-eval is there"
  exit 0
fi
echo "== $target: lm-eval, 220 MB"
rm -rf "$target.tmp" "$target"
# --no-deps: the lock file holds what differs from the environment, without libraries of single tasks (scikit-learn, nltk, ...)
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$target.tmp" --requirement "$lock"
cp "$lock" "$target.tmp/lock.txt"
mkdir -p "$(dirname "$target")"
mv "$target.tmp" "$target"
works || { echo "error: lm-eval in $target does not import; its own message is above" >&2; exit 4; }
