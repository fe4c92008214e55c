"""`hypenet cancel`: end the jobs of a run; what it has saved stays."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import typer

from megatron_hypenet.cli.options import DryRunOption, JsonOption
from megatron_hypenet.cli.status import RunArgument

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def cancel(
    run_folder: RunArgument, dry_run: DryRunOption = False, as_json: JsonOption = False
) -> None:
    """Stop the run: cancel every job of it that waits or runs, or ask the process that works on it
    on this machine.

    A step that runs is finished and saved first; under SLURM within its KillWait (30 s by default).

    Example:

      hypenet cancel runs/demo
    """
    from megatron_hypenet.checkpoint.places import run_of
    from megatron_hypenet.cluster.jobs import Jobs, slurm

    run_folder = run_of(run_folder)
    jobs = Jobs(run_folder)
    states = jobs.states()
    if not any(state.live for state in states.values()):
        stop_process(run_folder, dry_run=dry_run, as_json=as_json)
        return
    alive = [job for job in jobs.all if states[job.id].live]
    if not dry_run:
        for job in alive:  # before the signal: it may end the script that takes notes
            jobs.note(job, "cancelled by `hypenet cancel`")
        # the last first, so that none starts because the one before it is gone
        slurm("scancel", *(str(job.id) for job in reversed(alive)))
    if as_json:
        cancelled = [job.id for job in alive]
        print(json.dumps({"run": str(run_folder), "cancelled": cancelled, "process": None}))
        return
    what = "would cancel" if dry_run else "cancelled"
    for job in alive:
        print(f"{what} job {job.id} ({job.part}, {states[job.id].state})")
    if not dry_run:
        print(f"continue with `hypenet requeue {run_folder}`", file=sys.stderr)


def stop_process(run_folder: Path, *, dry_run: bool, as_json: bool) -> None:
    """Ask the process that works on the run without SLURM to save and leave. UsageError where it is
    on another machine."""
    from megatron_hypenet.cluster.run_state import is_here, state_of
    from megatron_hypenet.errors import UsageError

    found = state_of(run_folder, ())
    if found.pid and not is_here(found):
        raise UsageError(
            f"{run_folder}: {found.where} works on it, which cannot be asked from here; there use "
            f"`hypenet cancel {run_folder}`, or make the file {run_folder / 'STOP'}: the run saves "
            "and stops, and the file is deleted before it goes on"
        )
    if found.pid and not dry_run:
        os.kill(found.pid, signal.SIGTERM)
    if as_json:
        process = found.pid or None
        print(json.dumps({"run": str(run_folder), "cancelled": [], "process": process}))
    elif not found.pid:
        print(f"{run_folder}: no job waits or runs, and no process works on it")
    else:
        what = "would be asked" if dry_run else "asked"
        print(f"{found.where} {what} to save and stop")
        if not dry_run:
            print(f"`hypenet status {run_folder}` says when it has", file=sys.stderr)
