"""A run that is killed continues bit for bit in a new process; one that is asked to stop saves
first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megatron_hypenet
from megatron_hypenet.checkpoint.load import resolve, verify_files
from megatron_hypenet.checkpoint.shards import ShardReader
from tests.losses import read_losses

pytestmark = pytest.mark.slow

ROOT = Path(megatron_hypenet.__file__).parents[1]
WORKER = "tests.integration.training_worker"


STARTED_TOGETHER = f"""
import sys
from launchers import local
local.hypenet_command = lambda words: (sys.executable, "-m", "{WORKER}", *words)
sys.exit(local.run(local.LocalLaunch(tuple(sys.argv[2:]), int(sys.argv[1]), grace_seconds=2)))
"""


def run(*arguments, processes=1):
    """Run the worker in fresh processes; returns the finished subprocess."""
    start = ["-m", WORKER] if processes == 1 else ["-c", STARTED_TOGETHER, str(processes)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, *start, *map(str, arguments)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def assert_same_run(one, other, step):
    """Compare losses, gradient norms, weights and optimizer state of both, bit for bit."""
    assert (one / "losses.jsonl").read_text() == (other / "losses.jsonl").read_text()
    for part in ("weights", "optimizer"):
        want, got = (
            ShardReader(folder / "checkpoints" / f"iter_{step:07d}" / part)
            for folder in (one, other)
        )
        assert set(want) == set(got)
        assert [key for key in want if not torch.equal(want[key], got[key])] == []


@pytest.mark.parametrize(
    ("stage", "zero", "dtype"),
    [
        ("align", 1, "float32"),
        ("distill", 2, "bfloat16"),
        ("finetune", 3, "float32"),
        ("finetune", 1, "bfloat16"),
    ],
)
def test_killed_run_continues_bit_for_bit(tmp_path, stage, zero, dtype):
    options = ("--stage", stage, "--zero", zero, "--dtype", dtype)
    straight = run(tmp_path / "a", *options)
    assert straight.returncode == 0, straight.stderr[-3000:]
    killed = run(tmp_path / "b", *options, "--kill-after", 5)
    assert killed.returncode == -9 and resolve(tmp_path / "b" / stage).name == "iter_0000003"
    resumed = run(tmp_path / "b", *options)
    assert resumed.returncode == 0 and "resumed from" in resumed.stderr, resumed.stderr[-3000:]
    assert_same_run(tmp_path / "a" / stage, tmp_path / "b" / stage, 6)


@pytest.mark.distributed
def test_killed_run_of_two_processes_continues_bit_for_bit(tmp_path):
    """With ZeRO 3; tests/integration/test_faults.py has ZeRO 1."""
    straight = run(tmp_path / "a", "--zero", 3, processes=2)
    assert straight.returncode == 0, straight.stderr[-3000:]
    killed = run(tmp_path / "b", "--zero", 3, "--kill-after", 5, processes=2)
    assert killed.returncode == 137 and resolve(tmp_path / "b" / "finetune").name == "iter_0000003"
    resumed = run(tmp_path / "b", "--zero", 3, processes=2)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert_same_run(tmp_path / "a" / "finetune", tmp_path / "b" / "finetune", 6)


ONE = ((), 1)
TWO_DATA = (("--zero", 3), 2)
TWO_TENSOR = (("--tp", 2), 2)


@pytest.mark.distributed
@pytest.mark.parametrize(("before", "after"), [(ONE, TWO_DATA), (TWO_TENSOR, (("--zero", 2), 1))])
def test_continues_on_another_layout_and_zero_stage(tmp_path, before, after):
    straight = run(tmp_path / "a", *before[0], processes=before[1])
    assert straight.returncode == 0, straight.stderr[-3000:]
    run(tmp_path / "b", *before[0], "--kill-after", 4, processes=before[1])
    resumed = run(tmp_path / "b", *after[0], processes=after[1])
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert (
        f"on another layout (world {before[1]} -> {after[1]}, " in resumed.stderr
        and "; the global batch stays 8: " in resumed.stderr
    )
    want, got = (read_losses(tmp_path / name / "finetune" / "losses.jsonl") for name in "ab")
    assert [record["loss"] for record in got] == pytest.approx(
        [record["loss"] for record in want], rel=2e-6
    )
    assert [record["grad_norm"] for record in got] == pytest.approx(
        [record["grad_norm"] for record in want], rel=1e-5
    )


def test_termination_saves_and_exits_75(tmp_path):
    stopped = run(tmp_path / "b", "--term-after", 4)
    assert stopped.returncode == 75 and "SIGTERM" in stopped.stderr, stopped.stderr[-3000:]
    folder = resolve(tmp_path / "b" / "finetune")
    assert folder.name == "iter_0000004"
    verify_files(folder, hashes=True)
