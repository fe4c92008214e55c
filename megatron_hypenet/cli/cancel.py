"""`hypenet cancel`: end the jobs of a run; what it has saved stays."""

from __future__ import annotations

import json
import sys

import typer

from megatron_hypenet.cli.options import DryRunOption, JsonOption
from megatron_hypenet.cli.status import RunArgument

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def cancel(
    run_folder: RunArgument, dry_run: DryRunOption = False, as_json: JsonOption = False
) -> None:
    """Cancel every job of the run that waits or runs. A step that runs saves first, within SLURM's
    KillWait (30 s by default).

    Example: hypenet cancel runs/demo
    """
    from megatron_hypenet.cluster.jobs import Jobs, slurm

    jobs = Jobs(run_folder)
    jobs.required()
    states = jobs.states()
    alive = [job for job in jobs.all if states[job.id].live]
    if alive and not dry_run:
        for job in alive:  # before the signal: it may end the script that takes notes
            jobs.note(job, "cancelled by `hypenet cancel`")
        # the last first, so that none starts because the one before it is gone
        slurm("scancel", *(str(job.id) for job in reversed(alive)))
    if as_json:
        print(json.dumps({"run": str(run_folder), "cancelled": [job.id for job in alive]}))
        return
    what = "would cancel" if dry_run else "cancelled"
    for job in alive:
        print(f"{what} job {job.id} ({job.part}, {states[job.id].state})")
    if not alive:
        print(f"{run_folder}: no job waits or runs")
    elif not dry_run:
        print(f"continue with `hypenet requeue {run_folder}`", file=sys.stderr)
