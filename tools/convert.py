#!/usr/bin/env python3
"""`hypenet convert` as a script, for those who look for one: `tools/convert.py import|export|verify
...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_hypenet.cli.main import run  # noqa: E402

if __name__ == "__main__":
    sys.exit(run(["convert", *sys.argv[1:]]))
