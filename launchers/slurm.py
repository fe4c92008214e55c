"""One process of a `hypenet` command as a task of srun: `srun ... python -m launchers.slurm VERB
ARGS...`, one task per GPU.

SLURM says which task this is; here that becomes the place that torch.distributed and DeepSpeed
read. What cannot be found out ends the command with code 4: a process that met nobody would train
alone and look healthy. slurm/job.sbatch.j2 is the job script around it.

HYPENET_HEAD_ADDRESS   where rank 0 listens, when the script has resolved it (a container has no
                       scontrol to ask)
HYPENET_MASTER_PORT    its port there, when the script has looked for a free one or a person chose
                       one
HYPENET_ATTEMPT_LOGS   folder of this attempt; a task that fails leaves rank-0003.error.json there
                       for `hypenet logs --first-error`
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from launchers.command import MOST_PROCESSES, chosen_port, is_host, number_of, place
from megatron_hypenet.errors import HypenetError, SavedAndRequeue, SetupError

HEAD_ADDRESS = "HYPENET_HEAD_ADDRESS"
ATTEMPT_LOGS = "HYPENET_ATTEMPT_LOGS"

# below the range from which systems take ports for outgoing connections
_LOWEST_PORT = 10000
_PORTS = 20000
_HIGHEST_JOB = (1 << 32) - 1
_NODE_LIST = re.compile(r"[A-Za-z0-9_][\w.,\[\]-]*", re.ASCII)


def place_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The place of the task that has `environment`: RANK, WORLD_SIZE, MASTER_ADDR and their kin.
    Raises SetupError."""
    world_size = _number(environment, "SLURM_STEP_NUM_TASKS", 1, MOST_PROCESSES)
    rank = _number(environment, "SLURM_PROCID", 0, world_size - 1)
    counts = tasks_per_node(_text(environment, "SLURM_STEP_TASKS_PER_NODE"))
    local_size = counts[_number(environment, "SLURM_NODEID", 0, len(counts) - 1)]
    local_rank = _number(environment, "SLURM_LOCALID", 0, local_size - 1)
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) and "," not in visible:
        local_rank = 0  # SLURM bound this task to one GPU, which then is the only one it can name
    port = chosen_port(environment) or port_of(
        _number(environment, "SLURM_JOB_ID", 0, _HIGHEST_JOB)
    )
    return place(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_size=local_size,
        master=head_address(environment, port),
        port=port,
    )


def port_of(job_id: int) -> int:
    """The port on which the processes of a job meet unless HYPENET_MASTER_PORT says otherwise: the
    same in every task, another for the next job. slurm/job.sbatch.j2 begins with it, looks which
    ports the head node uses, and sets the variable."""
    return _LOWEST_PORT + job_id % _PORTS


def tasks_per_node(text: str) -> list[int]:
    """SLURM's short form as a list: "8(x2),4" -> [8, 8, 4]. Raises SetupError."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([1-9]\d{0,6})(?:\(x([1-9]\d{0,6})\))?", part, re.ASCII)
        if match is None or len(counts) > MOST_PROCESSES:
            raise SetupError(
                f"SLURM_STEP_TASKS_PER_NODE={text[:60]!r} is not a list of counts such as 8(x2),4"
            )
        counts += [int(match.group(1))] * int(match.group(2) or 1)
    return counts


def step_hosts(environment: Mapping[str, str]) -> list[str]:
    """Node of every task of this step, by rank, as srun places them unless told otherwise: node
    after node. Raises SetupError."""
    names = _names_of(_text(environment, "SLURM_STEP_NODELIST"))
    counts = tasks_per_node(_text(environment, "SLURM_STEP_TASKS_PER_NODE"))
    if len(names) != len(counts):
        raise SetupError(
            f"SLURM speaks of {len(names)} nodes (SLURM_STEP_NODELIST) and of tasks on "
            f"{len(counts)}"
        )
    return [name for name, count in zip(names, counts, strict=True) for _ in range(count)]


def _names_of(nodelist: str) -> list[str]:
    """The nodes of a list such as n[1-3]. Raises SetupError."""
    if not _NODE_LIST.fullmatch(nodelist):
        raise SetupError(
            f"SLURM_STEP_NODELIST={nodelist[:60]!r} is not a list of nodes such as n[1-3]"
        )
    names = _scontrol("show", "hostnames", nodelist).split()
    if not names or not all(map(is_host, names)):
        raise SetupError(
            f"scontrol show hostnames {nodelist} names no node, or none that can be a host: "
            f"{names[:3]}"
        )
    return names


def head_address(environment: Mapping[str, str], port: int) -> str:
    """Address of the first node of this step, which runs rank 0. Raises SetupError where it is not
    known or cannot be looked up."""
    address = environment.get(HEAD_ADDRESS) or _ask_scontrol(
        _text(environment, "SLURM_STEP_NODELIST")
    )
    try:
        if not is_host(address):
            raise OSError("it is not a host's name or address")
        socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise SetupError(
            f"the head node's address {address!r} cannot be looked up on {socket.gethostname()}: "
            f"{error}. Rank 0 listens there; ask the "
            f"cluster's administrators, or set {HEAD_ADDRESS} in the job script to an address that "
            "all nodes know"
        ) from error
    return address


def _ask_scontrol(nodelist: str) -> str:
    """The address SLURM itself uses for the first node of `nodelist`; names of nodes need not be
    names of hosts."""
    first = _names_of(nodelist)[0]
    described = _scontrol("--oneliner", "show", "node", first)
    match = re.search(r"\bNodeAddr=(\S+)", described)
    if match is None:
        raise SetupError(
            f"scontrol show node {first} gives no NodeAddr; it says {described[:200]!r}"
        )
    return match.group(1)


def _scontrol(*words: str) -> str:
    try:
        return subprocess.run(
            ["scontrol", *words], check=True, capture_output=True, text=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or "").strip()
        raise SetupError(
            f"cannot find the head node: scontrol {' '.join(words)}: {said or error}. "
            f"Inside a container set {HEAD_ADDRESS} before srun"
        ) from error


def _text(environment: Mapping[str, str], name: str) -> str:
    try:
        return environment[name]
    except KeyError:
        raise SetupError(
            f"{name} is not set: this process was not started by srun. Use `hypenet submit`, "
            "or srun ... python -m launchers.slurm VERB ..."
        ) from None


def _number(environment: Mapping[str, str], name: str, least: int, most: int) -> int:
    _text(environment, name)
    return number_of(environment, name, least, most)


def _leave_before_start(number: int, _frame: FrameType | None) -> NoReturn:
    """Asked to stop while nothing trains here yet, or any more: there is nothing to save, and the
    next start goes on from the disk."""
    sys.stderr.write(f"{signal.Signals(number).name} while no step was running; leaving\n")
    sys.stderr.flush()
    os._exit(SavedAndRequeue.exit_code)


def record_fault(fault: BaseException, code: int, environment: Mapping[str, str]) -> None:
    """Leave what ended this task in the attempt's folder, unless a record is there: the engine's
    says more. Being asked to stop is no fault."""
    folder = environment.get(ATTEMPT_LOGS)
    if folder is None or isinstance(fault, SavedAndRequeue):
        return
    rank = int(environment["RANK"])
    path = Path(folder, f"rank-{rank:04d}.error.json")
    if path.is_file():
        return
    content = {
        "time": time.time(),
        "rank": rank,
        "host": environment.get("SLURMD_NODENAME", socket.gethostname()),
        "code": code,
        "error": f"{fault}"
        if isinstance(fault, HypenetError)
        else f"{type(fault).__name__}: {fault}",
        "traceback": "".join(traceback.format_exception(fault)),
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def run(words: Sequence[str]) -> int:
    """Take this task's place and do the command; returns the exit code."""
    from megatron_hypenet.cli import main

    try:
        os.environ.update(place_of(os.environ))
    except SetupError as fault:
        return main.report_fault(fault, debug=False)
    here = {
        name: os.environ[name]
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    node = os.environ.get("SLURMD_NODENAME", "?")
    attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
    print(
        f"node {node} attempt {attempt} "
        f"{' '.join(f'{name}={value}' for name, value in here.items())}",
        file=sys.stderr,
        flush=True,
    )
    try:
        return main.dispatch(list(words))
    except (KeyboardInterrupt, Exception) as fault:
        # a job's task has a log of its own, which has room for the traceback
        code = main.report_fault(
            fault, debug=ATTEMPT_LOGS in os.environ and not isinstance(fault, SavedAndRequeue)
        )
        record_fault(fault, code, os.environ)
        return code


def main() -> NoReturn:
    """Entry point of a task."""
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, _leave_before_start)
    faulthandler.enable()
    code = run(sys.argv[1:])
    from megatron_hypenet.engine.process import leave

    leave(code)


if __name__ == "__main__":
    main()
