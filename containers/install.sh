#!/usr/bin/env bash
# What both container files run inside of the image, from the folder that holds requirements/ and the
# sources: first `libraries`, as the lock file has them, then `package`.
set -euo pipefail
lock=requirements/cuda-py312.txt
pip=(python -m pip --disable-pip-version-check install --no-cache-dir)
export PIP_ROOT_USER_ACTION=ignore
# DeepSpeed is built here, with torch in place and without compiling its operations
export DS_BUILD_OPS=0

case ${1:-} in
  libraries)
    mapfile -t tools < <(grep -E '^(pip|setuptools|wheel|packaging|numpy|ninja)==' "$lock")
    "${pip[@]}" "${tools[@]}"
    "${pip[@]}" --constraint "$lock" "$(grep -E '^torch==' "$lock")"
    "${pip[@]}" --no-deps --no-build-isolation --requirement "$lock"
    ;;
  package)
    "${pip[@]}" --no-deps --no-build-isolation .
    hypenet --version
    ;;
  *)
    echo "error: install.sh libraries | package" >&2
    exit 2
    ;;
esac
