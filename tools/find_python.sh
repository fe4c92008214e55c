# shellcheck shell=bash
# Sourced by the scripts beside it.

# Print the command of a Python 3.11 or 3.12 that really starts (a pyenv shim may not): $PYTHON where
# it is set, else the first one found. Fail when there is none.
find_python() {
  local candidate
  local candidates=(python3.11 python3.12 python3 /usr/bin/python3.1{1,2} /usr/bin/python3)
  if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    if python_version "$candidate" >/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

# Print 3.11 or 3.12, the version of the Python $1; fail when it has another one or does not start.
python_version() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null
}
