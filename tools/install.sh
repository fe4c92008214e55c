#!/usr/bin/env bash
# Builds the virtual environment in $1 (default .venv): Python 3.11 or 3.12, torch for this machine, DeepSpeed, then this package.
# Run through `make install`. Order matters: DeepSpeed's build and megatron-core must find the torch that was chosen here.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}

say() { printf '== %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 4; }

# The first of the candidates that is 3.11 or newer and really starts (a pyenv shim may not).
find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3 /usr/bin/python3.11 /usr/bin/python3.12 /usr/bin/python3; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

# Install a Debian package when root, else say how.
debian() {
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "apt-get install $*"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null
  else
    fail "missing on this machine: $*. Run: sudo apt-get update && sudo apt-get install -y $*"
  fi
}

python=$(find_python) || { debian python3 python3-venv; python=$(find_python) || fail "Python 3.11 or 3.12 is needed; set PYTHON=/path/to/python"; }
if [ ! -x "$venv/bin/python" ]; then
  say "creating $venv with $python ($("$python" --version))"
  "$python" -c 'import ensurepip, venv' 2>/dev/null || debian python3-venv
  "$python" -m venv "$venv"
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)

# setuptools 81 removed pkg_resources, which tensorboard and DeepSpeed's build still import
say "build tools"
"${pip[@]}" --upgrade pip 'setuptools>=77,<81' 'wheel' 'packaging>=24.2' 'numpy>=1.26' 'ninja>=1.11'

# torch first, alone: whatever depends on it must not choose another build
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
  say "torch for CUDA"
  "${pip[@]}" 'torch>=2.6'
elif "$venv/bin/python" -c 'import torch' 2>/dev/null; then
  say "torch is there: $("$venv/bin/python" -c 'import torch; print(torch.__version__)')"
else
  say "torch for the CPU"
  "${pip[@]}" "${TORCH_CPU_SPEC:-torch==2.13.0}"
fi

say "DeepSpeed, without compiling its operations"
DS_BUILD_OPS=0 "${pip[@]}" --no-build-isolation 'deepspeed>=0.19,<0.20'

say "this package and its development tools"
"${pip[@]}" --no-build-isolation --editable '.[dev]'

if [ -f tools/install_compat.sh ]; then
  say "the older transformers that exports are tested against too"
  bash tools/install_compat.sh "$venv"
fi
say "done: $("$venv/bin/hypenet" --version | head -n 1)"
