#!/usr/bin/env bash
# Install what Debian must give: as root what is missing, else name all of it in one command and end with code 4.
#   tools/system_packages.sh install     for `make install`: a Python with venv
#   tools/system_packages.sh test        for `make test`: also git, a C++ compiler, SLURM, ssh and pdsh, which the suite starts on free ports
#                                        and in folders of its own; the system's own daemons are never used
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/find_python.sh
PATH=$PATH:/usr/sbin:/sbin

missing=()
python=$(find_python) || missing+=(python3)
if ! "${python:-python3}" -c 'import ensurepip, venv' 2>/dev/null; then missing+=(python3-venv); fi
if [ "${1:-test}" = test ]; then
  # tool:package
  for pair in git:git g++:g++ slurmctld:slurm-wlm munged:munge ssh:openssh-client sshd:openssh-server pdsh:pdsh; do
    command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
  done
fi
if [ ${#missing[@]} = 0 ]; then exit 0; fi

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "error: this machine lacks ${missing[*]}; on Debian or Ubuntu run: sudo apt-get update && sudo apt-get install -y ${missing[*]}" >&2
  exit 4
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
apt-get update -qq
apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120 "${missing[@]}" </dev/null >/dev/null
