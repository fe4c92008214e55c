"""`hypenet doctor --slurm`: all nodes of an allocation, measured beside each other; not a verb of
its own.

Inside srun (or any launcher) each task measures and rank 0 reports; anywhere else srun is started,
one task per node.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from megatron_hypenet.errors import SetupError, UsageError
from megatron_hypenet.process_place import launched_world_size

if TYPE_CHECKING:
    from megatron_hypenet.cluster.node_check import Survey, Verdict

_WAIT_SECONDS = 30


def examine_nodes(
    folder: Path,
    *,
    nodes: int | None,
    srun_arguments: list[str],
    note: Path | None,
    as_json: bool,
) -> None:
    """Measure, print the table and the verdict; SetupError (exit 4) from the first process when
    nodes are to be left out."""
    if launched_world_size() is None:
        raise typer.Exit(
            _through_srun(
                folder, nodes=nodes, srun_arguments=srun_arguments, note=note, as_json=as_json
            )
        )
    if nodes is not None:
        raise UsageError(
            "--nodes is for the command that starts srun; this process is one of its tasks already"
        )
    from megatron_hypenet.cli import processes
    from megatron_hypenet.cluster.node_check import judge, measure_nodes
    from megatron_hypenet.parallel import groups

    processes.join()
    first = processes.is_rank0()
    try:
        found = measure_nodes(folder, hosts=_hosts_of_ranks() if first else ())
    finally:
        groups.destroy_parallel()
    verdict = judge(found)
    if first:
        print(
            as_text(found, verdict)
            if not as_json
            else json.dumps({**asdict(found), **asdict(verdict)}),
            flush=True,
        )
    if first and verdict.exclude:
        if {*verdict.exclude} >= {node.host for node in found.nodes}:
            raise SetupError(
                f"no node is fit to train; the cause may be common to all: {verdict.problems[0]}"
            )
        if note is not None:
            keep(note, verdict)
        count = f"{len(verdict.exclude)} node{'s are' if len(verdict.exclude) > 1 else ' is'}"
        raise SetupError(
            f"{count} not fit to train with the others; leave out: {exclude_option(verdict)}"
        )


def keep(folder: Path, verdict: Verdict) -> None:
    """Note the nodes to leave out in `folder`, where submit and requeue look for them."""
    from megatron_hypenet.cluster.faulty_nodes import FaultyNode
    from megatron_hypenet.cluster.faulty_nodes import note as write_note

    now = time.time()
    nodes = [
        FaultyNode(
            node=host,
            why="doctor: "
            + next((line for line in verdict.problems if line.startswith(f"{host} ")), "not fit"),
            time=now,
        )
        for host in verdict.exclude
    ]
    if nodes:
        write_note(folder, nodes)


def _hosts_of_ranks() -> list[str]:
    """Return the node of each rank where SLURM can be asked (a container may not be able to): to
    name those that never report."""
    from launchers.slurm import step_hosts

    try:
        return step_hosts(os.environ)
    except SetupError:
        return []


def exclude_option(verdict: Verdict) -> str:
    """Return the nodes to leave out as an option of sbatch, srun and salloc."""
    return f"--exclude={','.join(verdict.exclude)}"


def as_text(found: Survey, verdict: Verdict) -> str:
    """Return one line per process, one per link, then the verdict."""
    width = max(4, *(len(node.host) for node in found.nodes))
    lines = [f"{'node':<{width}}  rank  TFLOP/s  disk MiB/s  hardware"]
    for node in found.nodes:
        rate = f"{node.gemm_tflops:.3g}" if node.gemm_tflops else "-"
        disk = "-" if node.disk_mib_per_second is None else f"{node.disk_mib_per_second:.0f}"
        lines.append(
            f"{node.host:<{width}}  {node.rank:>4}  {rate:>7}  {disk:>10}  {node.hardware}"
        )
    lines += [
        f"link {link.hosts[0]} - {link.hosts[1]}: {link.gib_per_second:.2f} GiB/s"
        for link in found.links
    ]
    if found.all_reduce_gib_per_second is not None:
        lines.append(
            f"all-reduce over {len(found.nodes)} processes: {found.all_reduce_gib_per_second:.2f} "
            "GiB/s bus bandwidth"
        )
    versions = {name: value for node in found.nodes for name, value in node.versions.items()}
    lines.append(
        "versions: " + ", ".join(f"{name} {value}" for name, value in sorted(versions.items()))
    )
    lines += [f"problem: {problem}" for problem in verdict.problems]
    if verdict.exclude and not {*verdict.exclude} >= {node.host for node in found.nodes}:
        lines.append(f"leave out: {exclude_option(verdict)}")
    elif not verdict.problems:
        lines.append("all nodes are alike")
    return "\n".join(lines)


def srun_command(
    folder: Path,
    *,
    nodes: int | None,
    srun_arguments: list[str],
    as_json: bool,
    note: Path | None = None,
) -> list[str]:
    """Return the command that runs this check as one task for each GPU (one on each node without
    GPUs)."""
    command = ["srun", f"--ntasks-per-node={tasks_per_node(srun_arguments, os.environ)}"]
    command += [f"--nodes={nodes}", "--time=15"] if nodes else []
    # all end at the same time; one that hangs is not waited for
    command += [f"--wait={_WAIT_SECONDS}", *srun_arguments]
    command += [
        sys.executable,
        "-m",
        "launchers.slurm",
        "doctor",
        "--slurm",
        "--folder",
        str(folder.resolve()),
    ]
    command += ["--note", str(note.resolve())] if note is not None else []
    return [*command, "--json"] if as_json else command


def tasks_per_node(srun_arguments: list[str], environment: Mapping[str, str]) -> int:
    """Return the number of GPUs of a node, by what srun is asked for, else by what the allocation
    has; 1 where there are none."""
    asked = next(
        (word.partition("=")[2] for word in srun_arguments if word.startswith("--gpus-per-node=")),
        None,
    )
    count = (asked or environment.get("SLURM_GPUS_ON_NODE", "1")).rpartition(":")[2]
    return int(count) if count.isdecimal() and int(count) > 0 else 1


def _through_srun(
    folder: Path,
    *,
    nodes: int | None,
    srun_arguments: list[str],
    note: Path | None,
    as_json: bool,
) -> int:
    if shutil.which("srun") is None:
        raise SetupError(
            "doctor --slurm needs srun, which is not on the PATH; run it on a login node or inside "
            "an allocation"
        )
    if nodes is None and "SLURM_JOB_ID" not in os.environ:
        raise UsageError(
            "doctor --slurm outside an allocation: say how many nodes to look at with --nodes N "
            "(--srun-arg for the partition)"
        )
    command = srun_command(
        folder, nodes=nodes, srun_arguments=srun_arguments, note=note, as_json=as_json
    )
    print("+ " + shlex.join(command), file=sys.stderr, flush=True)
    code = subprocess.run(command, check=False).returncode
    return code if code < 128 else SetupError.exit_code  # a task that srun had to kill
