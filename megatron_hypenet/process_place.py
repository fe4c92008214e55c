"""What all launchers share: the command line of one process, its place among the others, and
whether we are such a process already."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_hypenet.errors import SetupError

UNDER_WAY = "HYPENET_UNDER_WAY"
"""Environment variable of processes that another process has started: the ranks of a command, and
the commands of a submitted job. The starting process has checked what prevents a start; a later
request, such as a STOP file, is for the running job."""

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The variables that tell a process its place; torch.distributed and DeepSpeed read them, too."""

CHOSEN_PORT = "HYPENET_MASTER_PORT"
"""Variable by which a person chooses the port where the processes of a cluster meet."""

HIGHEST_PORT = 65535
MOST_PROCESSES = 1 << 20
_MOST_DIGITS = 10

# Begins with a letter, a digit or the colon of an IPv6 address, so that no program takes it for an
# option or a pattern.
_HOST = re.compile(r"(?:[A-Za-z0-9_][\w.-]*@)?[A-Za-z0-9:][\w.:-]*", re.ASCII)
_LONGEST_HOST = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which of a launcher's processes this is."""

    rank: int
    world_size: int
    local_rank: int
    """Number on its machine, and of its GPU."""
    local_size: int | None
    """Processes on its machine; None where the launcher does not say."""
    master: str
    """Address at which rank 0 listens."""
    port: int


def host_name(environment: Mapping[str, str] = os.environ) -> str:
    """Return the name of this machine as SLURM calls it, else as it calls itself."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def under_way(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process goes on with what was begun before it; False for the command that
    a person has just given."""
    return UNDER_WAY in environment


def hypenet_command(words: Sequence[str]) -> tuple[str, ...]:
    """Return the words after `hypenet` as a command for this interpreter, which needs no console
    script on the PATH."""
    return (sys.executable, "-m", "megatron_hypenet", *words)


def place(
    *, rank: int, world_size: int, local_rank: int, local_size: int, master: str, port: int
) -> dict[str, str]:
    """Return the variables that tell a process its place; `launched_place` reads them."""
    values = (rank, local_rank, world_size, local_size, master, port)
    return {name: str(value) for name, value in zip(PLACE, values, strict=True)}


def launched_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Return the place that a launcher of the torchrun kind gave this process; None when none did.

    Raises SetupError that names the variable where they cannot be a launcher's: some are missing,
    or hold no number that is possible.
    """
    given = [name for name in ("RANK", "WORLD_SIZE") if name in environment]
    if not given:
        if environment.get("LOCAL_RANK", "0") != "0":  # engine/deepspeed/engine.py itself sets 0
            raise _left_over(environment, "LOCAL_RANK", "without RANK and WORLD_SIZE")
        return None
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in environment:
            raise _left_over(environment, given[0], f"without {name}")
    world_size = number_of(environment, "WORLD_SIZE", 1, MOST_PROCESSES)
    local_size = (
        number_of(environment, "LOCAL_WORLD_SIZE", 1, world_size)
        if "LOCAL_WORLD_SIZE" in environment
        else None
    )
    if not is_host(environment["MASTER_ADDR"]):
        raise _left_over(environment, "MASTER_ADDR", "which is not an address")
    return Place(
        rank=number_of(environment, "RANK", 0, world_size - 1),
        world_size=world_size,
        local_rank=number_of(environment, "LOCAL_RANK", 0, (local_size or world_size) - 1)
        if "LOCAL_RANK" in environment
        else 0,
        local_size=local_size,
        master=environment["MASTER_ADDR"],
        port=number_of(environment, "MASTER_PORT", 1, HIGHEST_PORT),
    )


def launched_world_size(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return the number of processes of the launcher that started this one; None when none did.
    Raises SetupError as `launched_place` does.

    A launcher of the torchrun kind sets RANK and WORLD_SIZE. SLURM's srun sets SLURM_PROCID; a step
    of one task is an interactive shell or a batch script, in which processes are still to be
    started.
    """
    if (found := launched_place(environment)) is not None:
        return found.world_size
    if "SLURM_PROCID" not in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return None
    tasks = number_of(environment, "SLURM_STEP_NUM_TASKS", 1, MOST_PROCESSES)
    return tasks if tasks > 1 else None


def number_of(environment: Mapping[str, str], name: str, least: int, most: int) -> int:
    """Return the number in the variable `name`, which is there. Raises SetupError with name and
    value where it is not from `least` to `most`."""
    number = _whole(environment[name], least, most)
    if number is None:
        raise _left_over(environment, name, f"which is not a whole number from {least} to {most}")
    return number


def chosen_port(environment: Mapping[str, str]) -> int | None:
    """Return the port that HYPENET_MASTER_PORT asks for; None where it is not set. Raises
    SetupError where it is no port."""
    text = environment.get(CHOSEN_PORT)
    if text is None:
        return None
    port = _whole(text, 1, HIGHEST_PORT)
    if port is None:
        raise SetupError(
            f"{CHOSEN_PORT}={text!r} is not a port; set a number from 1 to {HIGHEST_PORT}, "
            f"or unset {CHOSEN_PORT}"
        )
    return port


def is_host(name: str) -> bool:
    """Return whether `name` can be a host's name or address, perhaps as user@name: nothing that
    ssh, pdsh or scontrol take for something else."""
    return len(name) <= _LONGEST_HOST and _HOST.fullmatch(name) is not None


def threads_per_process(local_size: int) -> int:
    """Return the computing threads for each of `local_size` processes that share this machine's
    usable cores."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, cores // local_size)


def _whole(text: str, least: int, most: int) -> int | None:
    if not (text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS):
        return None
    return int(text) if least <= int(text) <= most else None


def _left_over(environment: Mapping[str, str], name: str, why: str) -> SetupError:
    slurms = name.startswith("SLURM_")
    who, names = ("Srun", name) if slurms else ("A launcher such as torchrun", " ".join(PLACE))
    return SetupError(
        f"{name}={environment[name][:60]!r} is set here, {why}. {who} sets it for the processes "
        "that it "
        f"starts; if none started this command, it is left over from something else, so unset it: "
        f"unset {names}"
    )
