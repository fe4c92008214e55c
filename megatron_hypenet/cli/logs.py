"""`hypenet logs`: show the output of a job's processes, or which of them failed first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_hypenet.cli.options import JsonOption
from megatron_hypenet.cli.status import RunArgument

if TYPE_CHECKING:
    from megatron_hypenet.cluster.first_error import Group
    from megatron_hypenet.cluster.jobs import Job, Jobs

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def logs(
    run_folder: RunArgument,
    first_error: Annotated[
        bool,
        typer.Option(
            "--first-error", help="Show what failed first, equal faults of many ranks as one."
        ),
    ] = False,
    rank: Annotated[int, typer.Option("--rank", min=0, help="Show this rank's log.")] = 0,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Lines from the end.")] = 40,
    job_id: Annotated[
        int | None,
        typer.Option(
            "--job", metavar="JOBID", help="Look at this job; default: the last that started."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the end of a rank's log of the last start, with the paths of all logs; or with
    --first-error the cause of a failure. Without SLURM the log is the run's, logs/hypenet.log.

    Examples:

      hypenet logs runs/demo

      hypenet logs runs/demo --first-error
    """
    from megatron_hypenet.checkpoint.places import run_of
    from megatron_hypenet.cluster.jobs import Jobs

    run_folder = run_of(run_folder)
    jobs = Jobs(run_folder)
    if job_id is None and started_here(jobs):
        show_local(run_folder, lines, rank, first_error=first_error, as_json=as_json)
        return
    job = chosen(jobs, job_id)
    if first_error:
        show_first_error(jobs, job if job_id else None, as_json=as_json)
    else:
        show_log(jobs, job, rank, lines, as_json=as_json)


def started_here(jobs: Jobs) -> bool:
    """Return whether the last start of the run was by a command outside of SLURM."""
    from megatron_hypenet.supervision.start_record import read_start

    start = read_start(jobs.folder)
    return not jobs.all or (start is not None and not start.job)


def show_local(
    run_folder: Path, count: int, rank: int, *, first_error: bool, as_json: bool
) -> None:
    """Show the end of the run's log, or what failed in its last start; UsageError for another
    rank's log."""
    from megatron_hypenet.cluster.run_state import local_faults
    from megatron_hypenet.errors import UsageError

    if first_error:
        groups = local_faults(run_folder)
        if as_json:
            content = [group.as_json() for group in groups]
            print(json.dumps({"job": None, "logs": str(run_folder / "errors"), "groups": content}))
        elif groups:
            print(f"last start: {run_folder / 'errors'}")
            show_groups(groups)
        else:
            print("no rank has reported a fault")
        return
    if rank:
        raise UsageError(
            f"--rank {rank}: without SLURM only the first process has a log; what another failed "
            f"with is shown by `hypenet logs {run_folder} --first-error`"
        )
    path = run_folder / "logs" / "hypenet.log"
    tail = _tail(path, count)
    if as_json:
        print(json.dumps({"job": None, "log": str(path), "lines": tail}))
        return
    print(f"{path}\n")
    print("\n".join(tail) if tail else "nothing has started yet")


def chosen(jobs: Jobs, job_id: int | None) -> Job:
    """Return the job asked for, or the last one that has started; DataError, UsageError when there
    is none such."""
    from megatron_hypenet.errors import DataError, UsageError

    known = jobs.required()
    if job_id is not None:
        found = next((job for job in known if job.id == job_id), None)
        if found is None:
            raise UsageError(
                f"{jobs.folder} has no job {job_id}; "
                f"it has {', '.join(str(job.id) for job in known)}"
            )
        return found
    started = [job for job in known if jobs.attempts(job)]
    if not started:
        raise DataError(
            f"no job of {jobs.folder} has started yet; `hypenet status {jobs.folder}` says what it "
            "waits for"
        )
    return max(started, key=lambda job: jobs.attempts(job)[-1].stat().st_ctime)


def show_log(jobs: Jobs, job: Job, rank: int, count: int, *, as_json: bool) -> None:
    """Show the last lines of a rank's log in the last start of `job`, or of the job's own log where
    no rank has started."""
    from megatron_hypenet.errors import UsageError

    attempts = jobs.attempts(job)
    ranks = sorted(attempts[-1].glob("rank-*.log")) if attempts else []
    path = attempts[-1] / f"rank-{rank:04d}.log" if ranks else jobs.log(job)
    if ranks and path not in ranks:
        raise UsageError(
            f"rank {rank} has no log in {attempts[-1]}; ranks 0 to {len(ranks) - 1} have"
        )
    tail = _tail(path, count)
    if as_json:
        print(
            json.dumps(
                {
                    "job": job.id,
                    "part": job.part,
                    "log": str(path),
                    "job_log": str(jobs.log(job)),
                    "lines": tail,
                }
            )
        )
        return
    others = f" (ranks 0 to {len(ranks) - 1} are beside it)" if len(ranks) > 1 else ""
    print(
        f"job {job.id} ({job.part}), start {len(attempts)}: {path}{others}\nscript and srun: "
        f"{jobs.log(job)}\n"
    )
    print("\n".join(tail))


def show_first_error(jobs: Jobs, only: Job | None, *, as_json: bool) -> None:
    """Show the faults of the newest start that had any: of job `only`, or of all jobs."""
    from megatron_hypenet.cluster.first_error import faults_of, grouped

    starts = [
        (folder, job)
        for job in ([only] if only else jobs.required())
        for folder in jobs.attempts(job)
    ]
    starts.sort(key=lambda start: start[0].stat().st_ctime, reverse=True)
    for folder, job in starts:
        groups = grouped(faults_of(folder, jobs.log(job)))
        if groups:
            break
    else:
        print(json.dumps({"groups": []}) if as_json else "no rank has reported a fault")
        return
    if as_json:
        print(
            json.dumps(
                {
                    "job": job.id,
                    "logs": str(folder),
                    "groups": [group.as_json() for group in groups],
                }
            )
        )
        return
    print(f"job {job.id} ({job.part}), {folder.name.replace('-', ' ')}: {folder}")
    show_groups(groups)


def show_groups(groups: list[Group]) -> None:
    """Show faults with their tracebacks, causes first."""
    for number, group in enumerate(groups):
        kind = (
            "then, as an echo" if group.first.is_echo and number else "then" if number else "first"
        )
        print(f"\n{kind}: {group.who()}: {group.first.error}")
        if group.first.traceback and not group.first.is_echo:
            print("    " + group.first.traceback.rstrip().replace("\n", "\n    "))


def _tail(path: Path, count: int) -> list[str]:
    return (
        path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]
        if path.is_file()
        else []
    )
