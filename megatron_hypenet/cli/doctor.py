"""`hypenet doctor`: check this machine: versions, devices, compilers, memory and disk, each with a
result and the fix."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_hypenet.cli.options import JsonOption
from megatron_hypenet.errors import SetupError, UsageError

app = typer.Typer(add_completion=False, rich_markup_mode=None)

Verdict = Literal["ok", "note", "broken"]
PACKAGE = "megatron-hypenet"
MIN_PYTHON = (3, 11)
MIN_FREE_DISK_GIB = 2.0
MIN_RAM_GIB = 2.0


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    verdict: Verdict
    detail: str
    fix: str = ""


@app.command()
def doctor(
    as_json: JsonOption = False,
    folder: Annotated[
        Path,
        typer.Option("--folder", help="Where runs will be written: its free space is checked."),
    ] = Path("."),
    slurm: Annotated[
        bool,
        typer.Option(
            "--slurm", help="Measure all nodes of an allocation beside each other instead."
        ),
    ] = False,
    nodes: Annotated[
        int | None,
        typer.Option(
            "--nodes", min=1, help="With --slurm outside an allocation: nodes to ask for."
        ),
    ] = None,
    srun_arg: Annotated[
        list[str] | None,
        typer.Option("--srun-arg", help="With --slurm: an argument for srun, repeatable."),
    ] = None,
    note: Annotated[
        Path | None,
        typer.Option(
            "--note",
            metavar="DIR",
            help="With --slurm: keep the nodes to leave out in this folder of runs, or of one run, "
            "for requeue.exclude_faulty.",
        ),
    ] = None,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Also run the GPU kernels against float64; needs a GPU."),
    ] = False,
) -> None:
    """Check this machine and exit 4 when something required is broken.

    Examples:

      hypenet doctor

      hypenet doctor --json --folder /scratch/runs

      hypenet doctor --kernels

      hypenet doctor --slurm --nodes 16 --srun-arg=--partition=gpu --srun-arg=--gpus-per-node=8
    """
    if not slurm and (nodes is not None or srun_arg or note is not None):
        raise UsageError("--nodes, --srun-arg and --note are for many nodes; add --slurm")
    if slurm and kernels:
        raise UsageError("--kernels is for this machine; leave it or --slurm out")
    if slurm:
        from megatron_hypenet.cli.node_doctor import examine_nodes

        examine_nodes(
            folder, nodes=nodes, srun_arguments=srun_arg or [], note=note, as_json=as_json
        )
        return
    findings = examine(folder) + (check_gpu_kernels() if kernels else [])
    broken = [finding for finding in findings if finding.verdict == "broken"]
    if as_json:
        typer.echo(
            json.dumps({"ok": not broken, "findings": [asdict(finding) for finding in findings]})
        )
    else:
        typer.echo(as_table(findings))
    if broken:
        fixes = "\n".join(
            f"  {finding.name}: {finding.fix or finding.detail}" for finding in broken
        )
        raise SetupError(
            f"this machine is not ready: {', '.join(finding.name for finding in broken)}\n{fixes}"
        )


def examine(folder: Path) -> list[Finding]:
    """Return all findings, in the order they are printed. No check raises: what cannot be found out
    becomes a finding."""
    parts: list[Callable[[], list[Finding]]] = [
        check_python,
        check_versions,
        check_torch,
        lambda: [
            check_import("megatron.core", "megatron-core"),
            check_import("deepspeed", "deepspeed"),
        ],
        check_transformer_engine,
        check_compilers,
        lambda: [check_memory(), check_disk(folder)],
    ]
    findings = []
    for part in parts:
        try:
            findings += part()
        except Exception as error:
            findings.append(
                Finding("doctor", "broken", f"a check failed: {type(error).__name__}: {error}")
            )
    return findings


def as_table(findings: list[Finding]) -> str:
    """Return one line per finding, verdict first, fixes indented below."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict:<6}  {finding.name:<{width}}  {finding.detail}")
        if finding.fix:
            lines.append(f"{'':<6}  {'':<{width}}  -> {finding.fix}")
    return "\n".join(lines)


def check_python() -> list[Finding]:
    """Check Python itself and the machine it runs on."""
    version = platform.python_version()
    good = sys.version_info[:2] >= MIN_PYTHON
    detail = f"{version} on {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    return [
        Finding(
            "python",
            "ok" if good else "broken",
            detail,
            "" if good else "install Python 3.11 or 3.12",
        )
    ]


def check_versions() -> list[Finding]:
    """Return every required library against the range that pyproject.toml declares, read from
    installed metadata."""
    from packaging.requirements import Requirement

    try:
        declared = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return [Finding(PACKAGE, "broken", "not installed", "make install, or pip install -e .")]
    findings = []
    for line in declared:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        findings.append(check_version(requirement.name, str(requirement.specifier)))
    return findings


def check_version(name: str, wanted: str) -> Finding:
    """Return one library: installed, and inside the range `wanted`?"""
    from packaging.specifiers import SpecifierSet

    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            name, "broken", f"not installed, needs {wanted}", f"pip install '{name}{wanted}'"
        )
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding(name, "ok", f"{version} (needs {wanted})")
    return Finding(name, "broken", f"{version}, needs {wanted}", f"pip install '{name}{wanted}'")


def check_torch() -> list[Finding]:
    """Check the devices that torch sees and the collectives it was built with."""
    try:
        import torch
    except Exception as error:
        return [
            Finding(
                "devices",
                "broken",
                f"torch does not import: {error}",
                "reinstall torch for this machine",
            )
        ]
    findings = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            findings.append(
                Finding(
                    f"cuda:{index}",
                    "ok",
                    f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB",
                )
            )
    else:
        findings.append(
            Finding("devices", "note", "no CUDA device; everything runs on the CPU, in float32", "")
        )
    available = torch.distributed.is_available()
    for backend, needed in (
        ("gloo", not torch.cuda.is_available()),
        ("nccl", torch.cuda.is_available()),
    ):
        there = available and getattr(torch.distributed, f"is_{backend}_available")()
        verdict: Verdict = "ok" if there else "broken" if needed else "note"
        fix = f"install a build of torch with {backend}" if verdict == "broken" else ""
        findings.append(
            Finding(backend, verdict, "available" if there else "not in this build of torch", fix)
        )
    return findings


def check_import(module: str, package: str) -> Finding:
    """Check that the library can be imported, without printing its warnings."""
    import contextlib
    import io

    noise = io.StringIO()
    try:
        with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            importlib.import_module(module)
    except Exception as error:
        detail = (
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        )
        return Finding(f"import {module}", "broken", detail, f"reinstall {package}: make install")
    return Finding(f"import {module}", "ok", "works")


def check_transformer_engine() -> list[Finding]:
    """Check whether Transformer Engine, which only model.transformer_impl=transformer_engine needs,
    fits this torch and CUDA."""
    from megatron_hypenet.model import transformer_engine as engine

    name = engine.PACKAGE
    if (version := engine.version_of(name)) is None:
        return [Finding(name, "note", "not installed; optional", engine.INSTALL)]
    if fault := engine.import_fault():
        return [Finding(name, "note", f"does not work: {fault}", engine.INSTALL)]
    return [Finding(name, "ok", f"{version}, works with this torch and CUDA")]


def check_gpu_kernels() -> list[Finding]:
    """Check each kernel against its float64 definition on this machine's GPU. Without a GPU this is
    a failure, because the user asked for it. A kernel that fails is reported as broken, though a
    run would use its torch form."""
    import torch

    if not torch.cuda.is_available():
        return [
            Finding(
                "kernels",
                "broken",
                "no CUDA GPU on this machine",
                "run it where the training will run",
            )
        ]
    from megatron_hypenet.model.kernel_guard import check_all_kernels

    fix = "update torch and triton together; runs use the torch form meanwhile"
    return [
        Finding(
            check.name,
            "ok" if check.ok else "broken",
            str(check).removeprefix(f"{check.name}: "),
            "" if check.ok else fix,
        )
        for check in check_all_kernels(torch.device("cuda"))
    ]


def check_compilers() -> list[Finding]:
    """Check g++, ninja and nvcc: needed only to build optional DeepSpeed operations."""
    findings = []
    for tool, purpose, fix in (
        (
            "g++",
            "builds DeepSpeed's optional operations, such as CPU offload of the optimizer",
            "apt-get install g++",
        ),
        ("ninja", "drives these builds", "pip install ninja"),
        (
            "nvcc",
            "builds CUDA operations",
            "install the CUDA toolkit, on a GPU machine that needs them",
        ),
    ):
        path = shutil.which(tool) or shutil.which(tool, path=str(Path(sys.executable).parent))
        findings.append(
            Finding(tool, "ok", path)
            if path
            else Finding(tool, "note", f"not found; {purpose}", fix)
        )
    return findings


def check_memory() -> Finding:
    """Check RAM: what is free now and what there is."""
    try:
        import psutil
    except ImportError as error:
        return Finding("memory", "broken", f"psutil does not import: {error}", "pip install psutil")
    memory = psutil.virtual_memory()
    free, total = memory.available / 2**30, memory.total / 2**30
    detail = f"{free:.1f} GiB free of {total:.1f} GiB"
    if free < MIN_RAM_GIB:
        return Finding("memory", "note", detail, f"the demo needs about {MIN_RAM_GIB:g} GiB free")
    return Finding("memory", "ok", detail)


def check_disk(folder: Path) -> Finding:
    """Free space where runs will be written, or at the nearest folder above that exists."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    detail = f"{free:.1f} GiB free at {place}"
    if not os.access(place, os.W_OK):
        return Finding("disk", "broken", f"{place} is not writable", "choose another --folder")
    if free < MIN_FREE_DISK_GIB:
        return Finding(
            "disk",
            "broken",
            detail,
            f"checkpoints of the demo need {MIN_FREE_DISK_GIB:g} GiB; free some space",
        )
    return Finding("disk", "ok", detail)
