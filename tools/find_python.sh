# Sourced by the scripts beside it.

# Print the first of the candidates that is Python 3.11 or 3.12 and really starts (a pyenv shim may not); fail when there is none.
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
