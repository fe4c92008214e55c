"""What all launchers share: the command line of one process, its place among the others, and whether we are such a process already."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

UNDER_WAY = "HYPENET_UNDER_WAY"
"""Set for processes that do what another has begun: the ranks of a command of ours, and what a submitted job runs. Who has begun has looked
for what stands in the way of a start; what comes later, such as a STOP file, is for a run that goes on."""


def under_way(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process goes on with what was begun before it; False for the command that a person has just given."""
    return UNDER_WAY in environment


def hypenet_command(words: Sequence[str]) -> tuple[str, ...]:
    """The words after `hypenet` as a command for this interpreter, which needs no console script on the PATH."""
    return (sys.executable, "-m", "megatron_hypenet", *words)


def place(*, rank: int, world_size: int, local_rank: int, local_size: int, master: str, port: int) -> dict[str, str]:
    """The variables that tell a process its place; torch.distributed, DeepSpeed and parallel/groups.py read them."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": master,
        "MASTER_PORT": str(port),
    }


def launched_world_size(environment: Mapping[str, str] = os.environ) -> int | None:
    """Number of processes of the launcher that started this one; None when none did.

    A launcher of the torchrun kind sets RANK and WORLD_SIZE. SLURM's srun sets SLURM_PROCID; a step of one task is an interactive shell
    or a batch script, in which processes are still to be started.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return int(environment["WORLD_SIZE"])
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    return tasks if "SLURM_PROCID" in environment and tasks > 1 else None


def threads_per_process(local_size: int) -> int:
    """Computing threads for each of `local_size` processes that share this machine's usable cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_size)
