"""`hypenet status`: show the progress of a run, from SLURM and from the run folder's files."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_hypenet.cli.options import JsonOption
from megatron_hypenet.errors import DataError

if TYPE_CHECKING:
    from megatron_hypenet.cluster.jobs import Jobs

app = typer.Typer(add_completion=False, rich_markup_mode=None)

# lines of logs/hypenet.log, which cli/progress.py writes: "TIME [4/10] align: WHAT" and "TIME
# iter 20/300 | loss 3.2 | ... | eta 1m"
_STEP_LINE = re.compile(r"^\S+ \[(\d+)/(\d+)\] (\w+): (.*)$")
_ITER_LINE = re.compile(r"^\S+\s+iter (\d+)/(\d+) \| (.*)$")

RunArgument = Annotated[
    Path,
    typer.Argument(metavar="RUN_DIR", help="Folder of a run (its output_dir), e.g. runs/demo."),
]


@app.command()
def status(run_folder: RunArgument, as_json: JsonOption = False) -> None:
    """Show the jobs of a run and how far it is: step, iteration, loss, speed, time left, last save,
    starts.

    Example: hypenet status runs/demo
    """
    from megatron_hypenet.cluster.jobs import Jobs

    jobs = Jobs(run_folder)
    found = {"run": str(run_folder), "jobs": job_rows(jobs), **progress_of(run_folder)}
    print(json.dumps(found) if as_json else "\n".join(lines_of(found)))


def job_rows(jobs: Jobs) -> list[dict[str, Any]]:
    """The newest job of each part of the run: id, part, state, where, starts, last note."""
    states = jobs.states()
    rows = []
    for job in jobs.newest_of_each_part():
        events = jobs.events(job)
        state = states[job.id]
        rows.append(
            {
                "id": job.id,
                "part": job.part,
                "state": state.state,
                "live": state.live,
                "reason": state.reason,
                "nodes": state.nodes,
                "time_left": state.time_left,
                "requeues": max((event.attempt for event in events), default=0),
                "note": events[-1].text if events else "",
                "log": str(jobs.log(job)),
            }
        )
    return rows


def progress_of(run_folder: Path) -> dict[str, Any]:
    """Progress of the run by its own files: finished tasks, the running task, its last logged
    iteration, the last save."""
    from megatron_hypenet.halo.run_folder import RunFolder

    folder = RunFolder(run_folder)
    text = (
        folder.log_file.read_text(encoding="utf-8", errors="replace")
        if folder.log_file.is_file()
        else ""
    )
    step, last_iteration = last_lines(text.splitlines())
    found: dict[str, Any] = {
        "finished": [],
        "step": step,
        "iteration": last_iteration,
        "last_save": last_save(run_folder),
        "problem": "",
    }
    try:
        found["finished"] = list(folder.records())
    except DataError as error:  # its jobs fail with it, and this verb is how to find out
        found["problem"] = str(error)
    return found


def last_lines(lines: list[str]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return (the last task in the log, its last training iteration), None for each that is
    missing."""
    iteration = None
    for line in reversed(lines):
        if iteration is None and (match := _ITER_LINE.match(line)):
            numbers = dict(part.strip().partition(" ")[::2] for part in match.group(3).split("|"))
            speed = next(
                (part.strip() for part in match.group(3).split("|") if "tok/s" in part), ""
            )
            iteration = {
                "number": int(match.group(1)),
                "of": int(match.group(2)),
                "loss": float(numbers["loss"]) if "loss" in numbers else None,
                "tokens_per_second": speed.removesuffix(" tok/s"),
                "eta": numbers.get("eta", ""),
                "whole_run": numbers.get("whole", "").removeprefix("run: "),
            }
        elif match := _STEP_LINE.match(line):
            place, of, name, what = match.groups()
            return {"name": name, "place": int(place), "of": int(of), "what": what}, iteration
    return None, iteration


def last_save(run_folder: Path) -> dict[str, Any] | None:
    """The checkpoint of the run that was committed last, and how many seconds ago."""
    from megatron_hypenet.checkpoint.format import COMMITTED, iteration_folders

    found = [
        (folder / COMMITTED).stat().st_mtime_ns
        for stage in run_folder.glob("*/checkpoints")
        for folder in iteration_folders(stage)
        if (folder / COMMITTED).is_file()
    ]
    if not found:
        return None
    newest = max(found)
    folder = next(
        path.parent
        for path in run_folder.glob(f"*/checkpoints/iter_*/{COMMITTED}")
        if path.stat().st_mtime_ns == newest
    )
    return {"checkpoint": str(folder), "seconds_ago": round(time.time() - newest / 1e9, 1)}


def lines_of(found: dict[str, Any]) -> list[str]:
    """The same as readable text."""
    from megatron_hypenet.training.metrics import short_time

    lines = [found["run"]]
    for row in found["jobs"]:
        where = f" on {row['nodes']}" if row["nodes"] and row["live"] else ""
        left = f", {row['time_left']} left" if row["time_left"] else ""
        reason = f" ({row['reason']})" if row["reason"] else ""
        requeues = f", started again {row['requeues']}x" if row["requeues"] else ""
        note = (
            ""
            if row["live"] or row["note"] == row["reason"] or row["state"] == "COMPLETED"
            else f"; {row['note']}"
        )
        lines.append(
            f"  job {row['id']:<8} {row['part']:<9} "
            f"{row['state']}{where}{left}{reason}{requeues}{note}"
        )
    if not found["jobs"]:
        lines.append("  no SLURM jobs")
    step, iteration, save = found["step"], found["iteration"], found["last_save"]
    lines.append(
        f"  step         {step['name']} ({step['place']}/{step['of']}): {step['what']}"
        if step
        else "  step         none has begun"
    )
    if iteration and step and "done" not in step["what"]:
        lines.append(
            f"  iteration    {iteration['number']}/{iteration['of']}, loss {iteration['loss']:.4g}"
        )
        whole = f"; whole run: {iteration['whole_run']}" if iteration["whole_run"] else ""
        lines.append(
            f"  speed        {iteration['tokens_per_second']} tokens/s, this stage: "
            f"{iteration['eta']} left{whole}"
        )
    lines.append(
        f"  last save    {save['checkpoint']}, {short_time(save['seconds_ago'])} ago"
        if save
        else "  last save    none yet"
    )
    lines.append(f"  finished     {', '.join(found['finished']) or 'nothing yet'}")
    lines += [f"  problem      {found['problem']}"] if found["problem"] else []
    return lines
