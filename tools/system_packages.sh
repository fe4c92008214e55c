#!/usr/bin/env bash
# Install what Debian must give: as root what is missing, else name all of it in one command and end with code 4.
#   tools/system_packages.sh install   for `make install`: a Python with venv
#   tools/system_packages.sh test      for `make test`: also make, git, a C++ compiler, Python's headers, and SLURM, ssh and pdsh, which the suite
#                                      starts on free ports and in folders of its own; the system's own daemons are never used
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/find_python.sh
PATH=$PATH:/usr/sbin:/sbin

fail() { printf 'error: %s\n' "$*" >&2; exit 4; }

missing=()
if python=$(find_python); then
  "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=("python$(python_version "$python")-venv")
elif [ -n "${PYTHON:-}" ]; then
  fail "PYTHON=$PYTHON is no Python 3.11 or 3.12 that starts"
elif command -v python3 >/dev/null; then
  fail "python3 is $(python3 --version 2>&1); Python 3.11 or 3.12 is needed: set PYTHON=/path/to/python"
else
  missing+=(python3 python3-venv)
fi
if [ "$1" = test ]; then
  # code that torch compiles includes Python.h
  if [ -z "${python:-}" ]; then
    missing+=(python3-dev)
  elif ! "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.isfile(sysconfig.get_path("include") + "/Python.h"))'; then
    missing+=("python$(python_version "$python")-dev")
  fi
  # tool:package
  for pair in make:make git:git g++:g++ slurmctld:slurm-wlm munged:munge ssh:openssh-client sshd:openssh-server pdsh:pdsh; do
    command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
  done
fi
if [ ${#missing[@]} = 0 ]; then exit 0; fi

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  fail "missing on this machine: ${missing[*]}. On Debian or Ubuntu run:
  sudo apt-get update && sudo apt-get install -y ${missing[*]}"
fi
echo "== apt-get install ${missing[*]}"
# Installing a daemon starts it, unless Debian's policy for services says no: containers have that policy, a bare machine does not.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq &&
  apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120 "${missing[@]}" </dev/null >/dev/null ||
  fail "apt-get could not install ${missing[*]}; its own message is above"
