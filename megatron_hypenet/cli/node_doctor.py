"""`hypenet doctor --slurm`: all nodes of an allocation, measured beside each other; not a verb of its own.

Inside srun (or any launcher) each task measures and rank 0 reports; anywhere else srun is started, one task per node.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from launchers.command import launched_world_size
from megatron_hypenet.errors import SetupError, UsageError

if TYPE_CHECKING:
    from megatron_hypenet.engine.node_check import Survey, Verdict


def examine_nodes(folder: Path, *, nodes: int | None, srun_arguments: list[str], as_json: bool) -> None:
    """Measure, print the table and the verdict; SetupError (exit 4) when nodes are to be left out."""
    if launched_world_size() is None:
        raise SystemExit(_through_srun(folder, nodes=nodes, srun_arguments=srun_arguments, as_json=as_json))
    if nodes is not None:
        raise UsageError("--nodes is for the command that starts srun; this process is one of its tasks already")
    from megatron_hypenet.cli import processes
    from megatron_hypenet.config.schema import ParallelConfig
    from megatron_hypenet.engine.node_check import judge, survey
    from megatron_hypenet.parallel import groups

    processes.join()
    groups.init_parallel(ParallelConfig())
    try:
        found = survey(folder)
        first = groups.rank() == 0
    finally:
        groups.destroy_parallel()
    verdict = judge(found)
    if first:
        print(as_text(found, verdict) if not as_json else json.dumps({**asdict(found), **asdict(verdict)}), flush=True)
    if verdict.exclude:
        if not first:
            raise SystemExit(SetupError.exit_code)
        raise SetupError(f"{len(verdict.exclude)} nodes are not fit to train with the others; leave them out: {exclude_option(verdict)}")


def exclude_option(verdict: Verdict) -> str:
    """The nodes to leave out as an option of sbatch, srun and salloc."""
    return f"--exclude={','.join(verdict.exclude)}"


def as_text(found: Survey, verdict: Verdict) -> str:
    """One line per process, one per link, then the verdict."""
    width = max(len(node.host) for node in found.nodes)
    lines = [f"{'node':<{width}}  rank  TFLOP/s  disk MiB/s  hardware"]
    lines += [
        f"{node.host:<{width}}  {node.rank:>4}  {node.gemm_tflops:>7.3g}  {node.disk_mib_per_second:>10.0f}  {node.hardware}"
        for node in found.nodes
    ]
    lines += [f"link {link.hosts[0]} - {link.hosts[1]}: {link.gib_per_second:.2f} GiB/s" for link in found.links]
    if found.all_reduce_gib_per_second is not None:
        lines.append(f"all-reduce over {len(found.nodes)} processes: {found.all_reduce_gib_per_second:.2f} GiB/s bus bandwidth")
    versions = {name: value for node in found.nodes for name, value in node.versions.items()}
    lines.append("versions: " + ", ".join(f"{name} {value}" for name, value in sorted(versions.items())))
    lines += [f"problem: {problem}" for problem in verdict.problems]
    if verdict.exclude:
        lines.append(f"leave out: {exclude_option(verdict)}")
    elif not verdict.problems:
        lines.append("all nodes are alike")
    return "\n".join(lines)


def srun_command(folder: Path, *, nodes: int | None, srun_arguments: list[str], as_json: bool) -> list[str]:
    """The command that runs this check as one task on each node."""
    command = ["srun", "--ntasks-per-node=1", *([f"--nodes={nodes}", f"--ntasks={nodes}"] if nodes else []), *srun_arguments]
    command += [sys.executable, "-m", "launchers.slurm", "doctor", "--slurm", "--folder", str(folder.resolve())]
    return [*command, "--json"] if as_json else command


def _through_srun(folder: Path, *, nodes: int | None, srun_arguments: list[str], as_json: bool) -> int:
    if shutil.which("srun") is None:
        raise SetupError("doctor --slurm needs srun, which is not on the PATH; run it on a login node or inside an allocation")
    if nodes is None and "SLURM_JOB_ID" not in os.environ:
        raise UsageError(
            "doctor --slurm outside an allocation: say how many nodes to look at with --nodes N (--srun-arg for the partition)"
        )
    command = srun_command(folder, nodes=nodes, srun_arguments=srun_arguments, as_json=as_json)
    print("+ " + " ".join(command), file=sys.stderr, flush=True)
    return subprocess.run(command, check=False).returncode
