#!/usr/bin/env bash
# Build the virtual environment in $1 (default .venv) from the lock file of this machine: Python 3.11 or 3.12, with CUDA or without. What is
# there already is brought to the locked versions. Run through `make install`.
#   LOCK=newest      take the newest releases inside pyproject.toml's ranges instead of the locked ones (`make test-newest`)
#   TORCH_CPU_SPEC   where pip finds the CPU build of the locked torch, if its index holds another build ("torch @ file:///...whl")
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/find_python.sh
venv=${1:-.venv}

say() { printf '== %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 4; }

bash tools/system_packages.sh install
python=$(find_python) || fail "Python 3.11 or 3.12 is needed; set PYTHON=/path/to/python"
if [ ! -x "$venv/bin/python" ]; then
  say "creating $venv with $python ($("$python" --version))"
  "$python" -m venv "$venv"
fi
python=$venv/bin/python
pip=("$python" -m pip --disable-pip-version-check install --quiet)

device=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then device=cuda; fi
lock=requirements/$device-$("$python" -c 'import sys; print("py%d%d" % sys.version_info[:2])').txt
[ -f "$lock" ] || fail "$lock is missing: $venv has a Python that is not supported; remove the folder"
[ "$(uname -sm)" = "Linux x86_64" ] || say "$lock was made for Linux on x86-64; on $(uname -sm) a pinned release may be missing"
locked() { grep -E "^($1)==" "$lock"; }

# the index that this pip uses decides which build of torch comes; whatever depends on torch must find it in place
torch=$(locked torch)
if [ $device = cpu ]; then torch=${TORCH_CPU_SPEC:-$torch}; fi

if [ "${LOCK:-}" = newest ]; then
  say "the newest releases, and torch as locked"
  "${pip[@]}" --upgrade pip $(locked 'setuptools|wheel')
  "${pip[@]}" "$torch"
  DS_BUILD_OPS=0 "${pip[@]}" --upgrade --upgrade-strategy eager --no-build-isolation --constraint <(locked 'torch|setuptools') \
    numpy ninja --editable '.[dev]'
else
  say "$lock: build tools"
  mapfile -t tools < <(locked 'pip|setuptools|wheel|packaging|numpy|ninja')
  "${pip[@]}" "${tools[@]}"
  say "$lock: torch"
  "${pip[@]}" --constraint "$lock" "$torch"
  say "$lock: everything else; DeepSpeed without compiling its operations"
  DS_BUILD_OPS=0 "${pip[@]}" --no-deps --no-build-isolation --requirement "$lock"
  "${pip[@]}" --no-deps --no-build-isolation --editable .
  "$python" -m pip --disable-pip-version-check check >/dev/null || "$python" -m pip --disable-pip-version-check check >&2 || fail "$lock is not whole"
fi

say "the older transformers that exports are tested against too"
bash tools/install_compat.sh "$venv"
say "done: $("$venv/bin/hypenet" --version | head -n 1)"
