import os
import subprocess
import sys

import pytest

from launchers.command import hypenet_command, launched_world_size, place, threads_per_process


def test_the_command_is_this_interpreters():
    assert hypenet_command(["train", "a b.yaml"]) == (sys.executable, "-m", "megatron_hypenet", "train", "a b.yaml")


def test_place():
    own = place(rank=5, world_size=8, local_rank=1, local_size=4, master="node0", port=29500)
    assert own == {
        "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "size"),
    [
        ({}, None),
        ({"RANK": "1", "WORLD_SIZE": "4"}, 4),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 1),
        ({"WORLD_SIZE": "4"}, None),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}, 8),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # a batch script: srun has not started its tasks
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),  # srun --pty bash
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "8", "RANK": "1", "WORLD_SIZE": "2"}, 2),
    ],
)
def test_being_under_a_launcher(environment, size):
    assert launched_world_size(environment) == size


def test_threads_share_the_cores():
    cores = len(os.sched_getaffinity(0))
    assert threads_per_process(1) == cores and threads_per_process(10 * cores) == 1


def test_launchers_import_nothing_heavy():
    code = "import launchers.local, launchers.command, sys; print([name for name in ('torch', 'numpy', 'pydantic') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
