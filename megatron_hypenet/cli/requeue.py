"""`hypenet requeue`: start a run's jobs again from what is saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_hypenet.cli.options import DryRunOption, JsonOption
from megatron_hypenet.cli.status import RunArgument

if TYPE_CHECKING:
    from megatron_hypenet.cluster.jobs import Job, Jobs, JobState

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def requeue(
    run_folder: RunArgument,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="NODES", help="Nodes not to use, e.g. n7 or n[7-9]."),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            "--include", metavar="NODE", help="Node to use again, whatever was held against it."
        ),
    ] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Put a running job back into the queue, or submit the jobs of an ended run again from the
    first that did not succeed; without nodes that were found to be slow or broken where the profile
    allows that (requeue.exclude_faulty).

    A running step is killed without warning and goes on from its last checkpoint; `touch
    RUN_DIR/SAVE_NOW` before it loses nothing.

    Example:

      hypenet requeue runs/demo --exclude n7
    """
    from megatron_hypenet.checkpoint.places import run_of
    from megatron_hypenet.cluster.faulty_nodes import forgive
    from megatron_hypenet.cluster.jobs import Jobs
    from megatron_hypenet.halo.run_folder import RunFolder
    from megatron_hypenet.ownership import refuse_if_owned

    run_folder = run_of(run_folder)
    jobs = Jobs(run_folder)
    jobs.required()
    RunFolder(run_folder).refuse_stop()
    if not any(state.live for state in jobs.states().values()):
        refuse_if_owned(run_folder)  # by a command that works in it without SLURM
    states = jobs.states()
    alive = [job for job in jobs.newest_of_each_part() if states[job.id].live]
    if include and not dry_run:
        forgive(run_folder, include)
    excluded = [node for node in exclude or [] if node not in (include or [])]
    if alive:
        rows = again(jobs, alive, states, excluded, dry_run=dry_run)
    else:
        rows = anew(jobs, states, excluded, dry_run=dry_run)
    if as_json:
        print(json.dumps({"run": str(run_folder), "jobs": rows}))
    elif not rows:
        print(f"{run_folder}: every job has succeeded, nothing to start again")
    else:
        print(
            "\n".join(
                f"{'would be ' if dry_run else ''}{row['what']}: job {row['id']} ({row['part']})"
                for row in rows
            )
        )


def again(
    jobs: Jobs,
    alive: list[Job],
    states: Mapping[int, JobState],
    by_hand: list[str],
    *,
    dry_run: bool,
) -> list[dict[str, object]]:
    """Requeue the job that runs, with further nodes excluded; waiting jobs only get the excluded
    nodes."""
    from megatron_hypenet.cluster.faulty_nodes import left_out
    from megatron_hypenet.cluster.jobs import slurm

    rows: list[dict[str, object]] = []
    for job in alive:
        running = states[job.id].state != "PENDING"
        faulty = left_out(jobs, job.exclude_faulty)
        changed = by_hand or faulty != job.left_out
        exclude = [*by_hand, *faulty] if changed else []
        nodes = ",".join(dict.fromkeys([*job.exclude, *exclude]))
        if not dry_run and running:
            slurm("scontrol", "requeuehold" if changed else "requeue", str(job.id))
        if not dry_run and changed:
            # only a waiting job can be changed; it is held meanwhile
            slurm("scontrol", "update", f"JobId={job.id}", f"ExcNodeList={nodes}")
            if running:
                slurm("scontrol", "release", str(job.id))
        avoid = f"told to avoid {nodes or 'no node'}"
        if running or changed:
            rows.append(
                {
                    "id": job.id,
                    "part": job.part,
                    "what": "put back into the queue" if running else avoid,
                }
            )
    return rows


def anew(
    jobs: Jobs, states: Mapping[int, JobState], exclude: list[str], *, dry_run: bool
) -> list[dict[str, object]]:
    """Submit the scripts of the run again, from the first part whose newest job did not succeed."""
    latest = jobs.newest_of_each_part()
    first = next(
        (index for index, job in enumerate(latest) if states[job.id].state != "COMPLETED"),
        len(latest),
    )
    rows: list[dict[str, object]] = []
    after: int | None = None
    for job in latest[first:]:
        number = job.id
        if not dry_run:
            nodes = list(dict.fromkeys([*job.exclude, *exclude]))
            number = after = jobs.submit(
                jobs.folder / job.script,
                job.part,
                after=after,
                exclude=nodes,
                exclude_faulty=job.exclude_faulty,
            ).id
        rows.append({"id": number, "part": job.part, "what": "submitted again"})
    return rows
