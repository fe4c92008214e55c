"""A process leaves at once with the code it was given."""

import os
import subprocess
import sys
from pathlib import Path

import megatron_hypenet

PROGRAM = """
import atexit, sys
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.supervision.process_exit import exit_process
from megatron_hypenet.parallel import groups
groups.init_parallel(ParallelConfig())
atexit.register(lambda: print("teardown ran"))
print("last words", end="")
exit_process(75)
"""


def test_code_and_output_survive_and_nothing_hangs():
    env = os.environ | {"PYTHONPATH": str(Path(megatron_hypenet.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (75, "last words"), done.stderr[-1000:]
