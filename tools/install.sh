#!/usr/bin/env bash
# Build the virtual environment in $1 (default .venv) from the lock file of this machine: Python 3.11 or 3.12, with CUDA or without. What is
# there already is brought to the locked versions; packages that are not locked stay, and are named. Run through `make install`.
#   PYTHON           the Python to use, if it is not the first one on PATH
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
  "$python" -m venv "$venv" || fail "$python could not make the virtual environment $venv"
elif [ -n "${PYTHON:-}" ] && [ "$(python_version "$venv/bin/python")" != "$(python_version "$python")" ]; then
  fail "$venv has $("$venv/bin/python" --version) and PYTHON=$PYTHON is $("$python" --version); remove $venv to use the latter"
fi
python=$venv/bin/python
version=$(python_version "$python") || fail "$venv has $("$python" --version), which is not supported; remove $venv and run make install again"
short=py${version/./}
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null
pip=("$python" -m pip --disable-pip-version-check install --quiet)

device=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then device=cuda; fi
lock=requirements/$device-$short.txt
[ "$(uname -sm)" = "Linux x86_64" ] || say "$lock was made for Linux on x86-64; on $(uname -sm) a pinned release may be missing"
locked() { grep -E "^($1)==" "$lock"; }

# Torch comes first, alone: the index that this pip uses decides which build it is, and whatever depends on torch must find it in place. A
# build for CUDA brings its libraries along, locked by the file for CUDA, which repeats everything that the one without CUDA pins.
install_torch() {
  local spec
  spec=$(locked torch)
  if [ $device = cpu ]; then spec=${TORCH_CPU_SPEC:-$spec}; fi
  "${pip[@]}" --constraint "requirements/cuda-$short.txt" "$spec"
  if [ $device = cuda ] && ! "$python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then
    fail "this machine has an NVIDIA GPU, and the torch in $venv was built without CUDA; remove $venv, let pip find a build with it, and run make install again"
  fi
}

# DeepSpeed is built here: with the torch and setuptools in place, and without compiling its operations.
export DS_BUILD_OPS=0
if [ "${LOCK:-}" = newest ]; then
  say "$venv: the newest releases in pyproject.toml's ranges, torch and setuptools as locked"
  mapfile -t tools < <(locked 'pip|setuptools|wheel|packaging|numpy|ninja')
  "${pip[@]}" "${tools[@]}"
  install_torch
  "${pip[@]}" --upgrade --upgrade-strategy eager --no-build-isolation --constraint <(locked 'torch|setuptools') \
    pip wheel numpy ninja --editable '.[dev,docs]'
else
  say "$venv: build tools, as $lock has them"
  mapfile -t tools < <(locked 'pip|setuptools|wheel|packaging|numpy|ninja')
  "${pip[@]}" "${tools[@]}"
  say "$venv: torch"
  install_torch
  say "$venv: everything else"
  "${pip[@]}" --no-deps --no-build-isolation --requirement "$lock"
  # setuptools warns of every editable installation that a folder of the same name elsewhere would be found first
  PYTHONWARNINGS=ignore "${pip[@]}" --no-deps --no-build-isolation --editable .
  # names as the lock file writes them; a build of torch for CUDA may have come to a machine without a GPU
  more=$("$python" -m pip --disable-pip-version-check freeze --exclude-editable | sed 's/[= @].*//' | tr 'A-Z_.' 'a-z--' |
    grep -vxFf <(sed 's/==.*//' "requirements/cuda-$short.txt") | tr '\n' ' ') || true
  [ -z "$more" ] || say "$venv also has packages that $lock does not name: $more"
  bash tools/install_compat.sh "$venv"
fi
"$python" -m pip --disable-pip-version-check check >&2 ||
  fail "these packages do not fit together; uninstall those that $lock does not name, or remove $venv, and run make install again"
say "done: $("$venv/bin/hypenet" --version | head -n 1)"
