"""SIGKILL in the middle of saves: the newest committed checkpoint is never lost, half a save is never taken, the run goes the same way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_hypenet

pytestmark = pytest.mark.slow

ROOT = Path(megatron_hypenet.__file__).parents[1]
KINDS = pytest.mark.parametrize("kind", [[], ["--background"]], ids=["foreground", "background"])


def kill(mode, folder, *options):
    """What the nursery counted; it fails itself on whatever it finds wrong."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.integration.kill_nursery", mode, str(folder), *options]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


@KINDS
def test_killed_before_every_file_operation_of_a_save(tmp_path, kind):
    """The save overwrites a damaged one and prunes: each rename, fsync, mkdir and removal of it in turn."""
    counted = kill("points", tmp_path, *kind)
    assert counted["kills"] > 30 and 5 < counted["already_committed"] < counted["kills"] - 20


@KINDS
def test_killed_at_random_moments_of_saves(tmp_path, kind):
    counted = kill("writer", tmp_path, "--kills", "8", *kind)
    assert counted["in_save"] == 8 and counted["step"] > 0


@KINDS
def test_killed_training_ends_with_the_same_losses(tmp_path, kind):
    counted = kill("training", tmp_path, "--kills", "4", *kind)
    assert counted["in_save"] >= 2 and (counted["step"], counted["lines"]) == (20, 20)
