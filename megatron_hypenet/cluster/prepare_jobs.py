"""A preparation of data as a job array of SLURM: one task for each share of the corpus, and a job
that joins them. Their text comes from slurm/prepare.sbatch.j2.

Not a verb: `hypenet data prepare --slurm` writes and sends them.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_hypenet.atomic_files import write_text
from megatron_hypenet.cluster.job_script import JobScript, check_paths, render
from megatron_hypenet.cluster.jobs import slurm
from megatron_hypenet.config.bundled import REPO_ROOT
from megatron_hypenet.config.cluster import ClusterConfig
from megatron_hypenet.errors import SetupError, UsageError

TEMPLATE = "prepare.sbatch.j2"
SUFFIXES = (".bin", ".idx", ".mask")


def jobs_folder(out: Path) -> Path:
    """Return the folder of the scripts and logs."""
    return out.absolute().with_name(f"{out.name}.jobs")


def part_names(out: Path, tasks: int) -> list[Path]:
    """Return the prefixes of the shares, in order."""
    return [
        out.absolute().with_name(f"{out.name}.part-{number}-of-{tasks}") for number in range(tasks)
    ]


def prepare_scripts(
    source: Path,
    out: Path,
    options: Sequence[str],
    cluster: ClusterConfig,
    *,
    tasks: int,
    workers: int | None,
) -> list[JobScript]:
    """Return the scripts of the array and of the job that joins its shares. `options` are further
    words of `hypenet data prepare`.

    A task has one worker for each of its CPUs: `workers`, else the profile's cpus_per_task, else
    what SLURM gives it. Raises ConfigError for paths that a job script cannot hold.
    """
    folder = jobs_folder(out)
    check_paths(folder)
    python = cluster.python or ("python3" if cluster.container else sys.executable)
    verb = [python, "-m", "megatron_hypenet", "data"]
    names = [str(name) for name in part_names(out, tasks)]
    cpus = workers or cluster.cpus_per_task
    count = [] if cpus is None else ["--workers", str(cpus)]
    commands = {
        "prepare": [*verb, "prepare", *options, *count, str(source.absolute())],
        "join": [*verb, "merge", "--overwrite", str(out.absolute()), *names],
    }
    return [
        JobScript(
            part=part,
            path=folder / f"{part}.sbatch",
            text=render(
                template=TEMPLATE,
                title=f"{part} {out.name}, {tasks} shares",
                name=f"{out.name}-{part}",
                cluster=cluster,
                tasks=tasks if part == "prepare" else 0,
                cpus=cpus if part == "prepare" else None,
                cwd=str(Path.cwd()),
                folder=str(folder),
                repo=str(REPO_ROOT),
                out=str(out.absolute()),
                parts=[f"{name}{suffix}" for name in names for suffix in SUFFIXES],
                command=shlex.join(words),
            ),
        )
        for part, words in commands.items()
    ]


def refuse_earlier(out: Path) -> None:
    """Raise UsageError when an earlier array for this prefix left shares or scripts."""
    left = [jobs_folder(out), *sorted(out.absolute().parent.glob(f"{out.name}.part-*"))]
    found = [path for path in left if path.exists()]
    if found:
        raise UsageError(
            f"{found[0]} is there from an earlier array; hand its prepare.sbatch to sbatch to go "
            "on with it, pass --overwrite to delete it and begin again, or choose another prefix"
        )


def remove_earlier(out: Path) -> None:
    """Delete what an earlier array for this prefix left."""
    shutil.rmtree(jobs_folder(out), ignore_errors=True)
    for path in out.absolute().parent.glob(f"{out.name}.part-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def send(scripts: Sequence[JobScript]) -> list[int]:
    """Write the scripts and submit them, each after the one before it has succeeded; the numbers of
    the jobs. Raises SetupError."""
    sent: list[int] = []
    for script in scripts:
        write_text(script.path, script.text)
        words = ["sbatch", "--parsable"]
        if sent:
            words += [f"--dependency=afterok:{sent[-1]}", "--kill-on-invalid-dep=yes"]
        answer = slurm(*words, str(script.path))
        number = answer.strip().split(";")[0]
        if not number.isdecimal():
            raise SetupError(f"sbatch {script.path} gave no job number but {answer!r}")
        sent.append(int(number))
    return sent
