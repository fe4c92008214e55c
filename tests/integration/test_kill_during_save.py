"""SIGKILL in the middle of saves: the newest committed checkpoint is never lost, half a save is
never taken, the run goes the same way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_hypenet
from megatron_hypenet.checkpoint.load import resolve, verify_files
from tests.integration.test_kill_resume import assert_same_run, run

pytestmark = pytest.mark.slow

ROOT = Path(megatron_hypenet.__file__).parents[1]
KINDS = pytest.mark.parametrize("kind", ["foreground", "background"])


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Provide what the worker counted; it fails itself on whatever it finds wrong."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [
        sys.executable,
        "-m",
        "tests.integration.kill_during_save_worker",
        str(tmp_path_factory.mktemp("kills") / "all"),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print(result)
    return result


@KINDS
def test_killed_before_every_file_operation_of_a_save(counted, kind):
    """The save overwrites a damaged one and prunes: each rename, fsync, mkdir and removal of it in
    turn."""
    points = counted[f"points-{kind}"]
    assert points["kills"] > 30 and 5 < points["already_committed"] < points["kills"] - 20


@KINDS
def test_killed_at_random_moments_of_saves(counted, kind):
    assert counted[f"writer-{kind}"]["in_save"] == 8 and counted[f"writer-{kind}"]["step"] > 0


@KINDS
def test_killed_training_ends_with_the_same_losses(counted, kind):
    training = counted[f"training-{kind}"]
    assert training["in_save"] >= 2 and (training["step"], training["lines"]) == (20, 20)


@pytest.mark.distributed
def test_one_process_of_two_dies_between_two_tensors(tmp_path):
    """Half of the save's files never come: the other process must neither commit nor wait for
    ever."""
    options = ("--save-interval", 2, "--zero", 2)
    straight = run(tmp_path / "a", *options, processes=2)
    assert straight.returncode == 0, straight.stderr[-3000:]
    for step, words in ((4, ("--async-save",)), (6, ())):
        killed = run(tmp_path / "b", *options, *words, "--die-writing", step, processes=2)
        assert killed.returncode != 0 and "diverged" not in killed.stderr
        left = resolve(tmp_path / "b" / "finetune")
        assert left.name == f"iter_{step - 2:07d}"
        verify_files(left, hashes=True)
    resumed = run(tmp_path / "b", *options, "--async-save", processes=2)
    assert resumed.returncode == 0 and "resumed from" in resumed.stderr, resumed.stderr[-3000:]
    assert_same_run(tmp_path / "a" / "finetune", tmp_path / "b" / "finetune", 6)
