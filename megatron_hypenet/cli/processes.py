"""Decide how many processes a verb gets, and start them here or on the hosts of a hostfile when no
launcher has.

Not a verb: every verb that computes uses it. Each process gets the words of the command line again,
finds its rank in the environment, and continues where the starting process stopped.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import RunConfig
from megatron_hypenet.errors import SetupError, UsageError
from megatron_hypenet.process_place import launched_world_size, threads_per_process

if TYPE_CHECKING:
    from launchers.launch import Launch

WORDS: ContextVar[tuple[str, ...]] = ContextVar("words after `hypenet`", default=())
"""The words of this process's command line; cli/main.py sets it."""

LAUNCHERS = ("local", "hostfile")
"""What --launcher takes; SLURM has `hypenet submit`."""

_hostfile: ContextVar[tuple[Path, tuple[str, ...]] | None] = ContextVar(
    "hostfile and names of variables for it", default=None
)

_THREADS = "OMP_NUM_THREADS"
_threads_are_ours = False


def choose(launcher: str, hostfile: Path | None, names: Sequence[str] | None) -> None:
    """Set the launcher by --launcher, --hostfile and --env. A process that a launcher started
    ignores them. Raises UsageError."""
    if launcher not in LAUNCHERS:
        raise UsageError(
            f"--launcher {launcher}: choose one of {', '.join(LAUNCHERS)}; `hypenet submit` starts "
            "runs under SLURM"
        )
    if launcher == "hostfile" and hostfile is None:
        raise UsageError(
            "--launcher hostfile needs --hostfile FILE, with lines such as `worker-1 slots=8`"
        )
    if launcher == "local" and (hostfile is not None or names):
        raise UsageError("--hostfile and --env are for other hosts; add --launcher hostfile")
    elsewhere = hostfile is not None and launched_world_size() is None
    _hostfile.set((hostfile, tuple(names or ())) if hostfile is not None and elsewhere else None)


def join() -> int | None:
    """Return the number of processes of the launcher that started this one, None when none did. A
    bare task of srun takes its place from SLURM."""
    size = launched_world_size()
    if size is not None and "RANK" not in os.environ:
        from launchers.slurm import place_of

        os.environ.update(place_of(os.environ))
    return size


def count(run: RunConfig, shape: ModelConfig | None, nproc: int | None) -> int:
    """Count the processes that `run` gets: the launcher's or hostfile's, else --nproc, else as many
    GPUs as its layout can use, else one replica's.

    Raises UsageError when --nproc contradicts the launcher, SetupError when this machine has too
    few GPUs.
    """
    size = run.parallel.model_parallel_size
    started = join()
    if started is None and nproc is None and run.device != "cpu" and _hostfile.get() is None:
        return _fitting(run, shape, size)
    return fixed(size, nproc)


def fixed(size: int, nproc: int | None = None) -> int:
    """Return the launcher's number of processes, else `nproc`, else `size`. Raises as `count`
    does."""
    started = join()
    if started is not None:
        if nproc not in (None, started):
            raise UsageError(
                f"--nproc {nproc} in a process that a launcher started as one of {started}; "
                "leave --nproc out"
            )
        return started
    if (chosen := _hostfile.get()) is not None:
        from launchers.hostfile import read_hostfile

        if nproc is not None:
            raise UsageError(
                f"--nproc {nproc} with a hostfile; its slots say how many processes each host gets"
            )
        return sum(host.slots for host in read_hostfile(chosen[0]))
    asked = nproc or size
    if asked > 1:
        _refuse_too_few_gpus(asked, _gpus(), by_hand=nproc is not None)
    return asked


def has_gpus() -> bool:
    """Return whether this machine has GPUs that torch can use."""
    return _gpus() > 0


def planned_start(num_processes: int) -> Launch | None:
    """Return what `start_here` would start: this command, in several processes; None when it would
    return.
    --dry-run is not for them."""
    words = tuple(word for word in WORDS.get() if word != "--dry-run")
    if (chosen := _hostfile.get()) is not None:
        from launchers import hostfile, hostfile_job

        return hostfile_job.HostfileStart(hostfile.planned(words, *chosen))
    if num_processes == 1 or launched_world_size() is not None:
        return None
    from launchers.local import LocalLaunch

    return LocalLaunch(words, num_processes)


def start_here(num_processes: int) -> None:
    """Do this command in `num_processes` processes and leave with their exit code; returns when one
    is enough or a launcher was there."""
    if _threads_are_ours and (num_processes > 1 or _hostfile.get() is not None):
        os.environ.pop(_THREADS, None)  # it was for one process
    launch = planned_start(num_processes)
    if launch is not None:
        raise typer.Exit(launch.start())


def is_rank0() -> bool:
    """Return whether this process prints for the user: rank 0 of a launcher's, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def use_all_cores() -> None:
    """Let one process compute on every core it may use. On shared or virtual machines torch may
    start more threads than this process has cores, which slows tiny models down."""
    global _threads_are_ours
    if _THREADS not in os.environ:
        os.environ[_THREADS] = str(threads_per_process(1))
        _threads_are_ours = True


def _fitting(run: RunConfig, shape: ModelConfig | None, size: int) -> int:
    """Return as many of the visible GPUs as form whole replicas that share every global batch
    evenly; `size` without GPUs."""
    from megatron_hypenet.config.checks import layout_problems
    from megatron_hypenet.config.layout import Layout

    gpus = _gpus()
    _refuse_too_few_gpus(size, gpus)
    if gpus <= 1:
        return size
    most = gpus - gpus % size
    return next(
        (
            number
            for number in range(most, 0, -size)
            if not layout_problems(Layout(shape, run, number))
        ),
        size,
    )


def _refuse_too_few_gpus(wanted: int, gpus: int, *, by_hand: bool = False) -> None:
    if 0 < gpus < wanted:
        raise SetupError(
            f"{wanted} processes need a GPU each, and {gpus} are visible here; "
            f"ask for {gpus} or fewer ({'--nproc, or ' if by_hand else ''}smaller tensor, "
            "pipeline and context sizes), or start the command on more machines with `hypenet "
            "submit`"
        )


@functools.cache
def _gpus() -> int:
    from launchers.local import visible_gpus

    return visible_gpus()
