"""A process goes on when its terminal is closed, and keeps writing to files."""

import os
import pty
import subprocess
import sys

CODE = """
import os, sys
from megatron_hypenet.terminal import leave_terminal
os.write(2, b"ready\\n")
assert sys.stdin.readline()
try:
    print("to nobody", flush=True)
except OSError:
    os.write(2, b"writing fails\\n")
leave_terminal()
print("to nowhere", flush=True)
os.write(2, b"still here\\n")
"""


def test_what_went_to_a_closed_terminal_goes_nowhere():
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CODE],
        stdin=subprocess.PIPE,
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None and process.stderr.readline() == "ready\n"
    os.close(theirs)
    os.close(ours)
    assert process.communicate("go\n", timeout=60)[1] == "writing fails\nstill here\n"
    assert process.returncode == 0
