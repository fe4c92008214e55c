"""One process of a `hypenet` command as a task of srun: `srun ... python -m launchers.slurm VERB
ARGS...`, one task per GPU.

SLURM's variables say which task this is; this module turns them into the variables that
torch.distributed and DeepSpeed read. If one cannot be found out, the command ends with code 4: a
process without the others would train alone and look healthy. What the task then does is in
megatron_hypenet/cli/srun_task.py; slurm/job.sbatch.j2 is the job script around it.

HYPENET_HEAD_ADDRESS   where rank 0 listens, when the script has resolved it (a container has no
                       scontrol to ask)
HYPENET_MASTER_PORT    its port there, when the script has looked for a free one or a person chose
                       one
"""

from __future__ import annotations

import re
import runpy
import socket
import subprocess
from collections.abc import Mapping

from megatron_hypenet.errors import SetupError
from megatron_hypenet.process_place import MOST_PROCESSES, chosen_port, is_host, number_of, place

HEAD_ADDRESS = "HYPENET_HEAD_ADDRESS"

# below the range from which systems take ports for outgoing connections
_LOWEST_PORT = 10000
_PORTS = 20000
_HIGHEST_JOB = (1 << 32) - 1
_NODE_LIST = re.compile(r"[A-Za-z0-9_][\w.,\[\]-]*", re.ASCII)


def place_of(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the place of the task that has `environment`: RANK, WORLD_SIZE, MASTER_ADDR and the
    other variables. Raises SetupError."""
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
    """Return the port on which the processes of a job meet unless HYPENET_MASTER_PORT says
    otherwise: the same in every task, another for the next job. slurm/job.sbatch.j2 begins with it,
    looks which ports the head node uses, and sets the variable."""
    return _LOWEST_PORT + job_id % _PORTS


def tasks_per_node(text: str) -> list[int]:
    """Expand SLURM's short form to a list: "8(x2),4" -> [8, 8, 4]. Raises SetupError."""
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
    """Return the node of every task of this step, by rank, as srun places them by default: node
    after node. Raises SetupError."""
    names = _names_of(_text(environment, "SLURM_STEP_NODELIST"))
    counts = tasks_per_node(_text(environment, "SLURM_STEP_TASKS_PER_NODE"))
    if len(names) != len(counts):
        raise SetupError(
            f"SLURM_STEP_NODELIST names {len(names)} nodes, and SLURM_STEP_TASKS_PER_NODE has "
            f"counts for {len(counts)}: they belong to different steps; start this with srun anew"
        )
    return [name for name, count in zip(names, counts, strict=True) for _ in range(count)]


def _names_of(nodelist: str) -> list[str]:
    """Return the nodes of a list such as n[1-3]. Raises SetupError."""
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
    """Return the address of the first node of this step, which runs rank 0. Raises SetupError where
    it is not known or cannot be looked up."""
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
    """Return the address SLURM itself uses for the first node of `nodelist`; names of nodes need
    not be names of hosts."""
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


if __name__ == "__main__":
    # by name: the command starts processes through these launchers, so they do not import it
    runpy.run_module("megatron_hypenet.cli.srun_task", run_name="__main__")
