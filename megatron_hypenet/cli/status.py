"""`hypenet status`: show the progress of a run, from SLURM and from the run folder's files."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_hypenet.cli.options import JsonOption
from megatron_hypenet.errors import DataError

if TYPE_CHECKING:
    from megatron_hypenet.cluster.jobs import Jobs, JobState

app = typer.Typer(add_completion=False, rich_markup_mode=None)

# lines of logs/hypenet.log, which cli/progress.py writes: "TIME [4/10] align: WHAT" and "TIME
# iter 20/300 | loss 3.2 | ... | eta 1m"
_STEP_LINE = re.compile(r"^\S+ \[(\d+)/(\d+)\] (\w+): (.*)$")
_ITER_LINE = re.compile(r"^\S+\s+iter (\d+)/(\d+) \| (.*)$")

_NOT_FORESEEN = {"eta": "", "eta_seconds": None, "whole_run": "", "whole_run_seconds": None}
"""The times of a run that does not run: what it said last was true only if it had gone on."""

RunArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_DIR",
        help="Folder of a run (its output_dir), e.g. runs/demo, or a stage or checkpoint in it.",
    ),
]


@app.command()
def status(run_folder: RunArgument, as_json: JsonOption = False) -> None:
    """Show whether a run runs, where, or why it stopped and how it goes on; and how far it is:
    step, iteration, loss, speed, time left, last save; under SLURM its jobs too.

    Example:

      hypenet status runs/demo
    """
    from megatron_hypenet.checkpoint.places import run_of

    found = status_of(run_of(run_folder))
    print(json.dumps(found) if as_json else "\n".join(lines_of(found)))


def status_of(run_folder: Path) -> dict[str, Any]:
    """Return everything that `status` says, as plain data: times in seconds, speeds in tokens per
    second."""
    from megatron_hypenet.cluster.jobs import Jobs
    from megatron_hypenet.cluster.run_state import RUNNING, state_of

    jobs = Jobs(run_folder)
    progress = progress_of(run_folder)
    states = jobs.states()
    found = state_of(run_folder, progress["finished"], jobs.newest_of_each_part(), states)
    if progress["iteration"] is not None and found.state != RUNNING:
        progress["iteration"] |= _NOT_FORESEEN
    return {
        "run": str(run_folder),
        **asdict(found),
        "jobs": job_rows(jobs, states),
        "faulty_nodes": faulty_rows(jobs),
        **progress,
    }


def job_rows(jobs: Jobs, states: Mapping[int, JobState]) -> list[dict[str, Any]]:
    """Return the newest job of each part of the run: id, part, state, where, starts, last note."""
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


def faulty_rows(jobs: Jobs) -> list[dict[str, Any]]:
    """Return the nodes that something is held against, and whether the run leaves them out."""
    from megatron_hypenet.cluster.faulty_nodes import faulty, left_out

    limit = max((job.exclude_faulty for job in jobs.newest_of_each_part()), default=0)
    out = left_out(jobs, limit)
    return [
        {
            "node": one.node,
            "why": one.why,
            "seconds_ago": round(time.time() - one.time, 1),
            "left_out": one.node in out,
        }
        for one in (faulty(jobs) if jobs.all else [])
    ]


def progress_of(run_folder: Path) -> dict[str, Any]:
    """Return the progress of the run by its own files: finished tasks, the running task, its last
    logged iteration, the last save."""
    from megatron_hypenet.halo.run_folder import RunFolder

    folder = RunFolder(run_folder)
    text = (
        folder.log_file.read_text(encoding="utf-8", errors="replace")
        if folder.log_file.is_file()
        else ""
    )
    step, last_iteration = last_lines(text.splitlines())
    if last_iteration is not None and step is not None:
        last_iteration |= exact_figures(run_folder, step["name"])
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
            eta = numbers.get("eta", "")
            whole = numbers.get("whole", "").removeprefix("run: ").removeprefix("command: ")
            iteration = {
                "number": int(match.group(1)),
                "of": int(match.group(2)),
                "loss": float(numbers["loss"]) if "loss" in numbers else None,
                "tokens_per_second": number_of(speed.removesuffix(" tok/s")),
                "eta": eta,
                "eta_seconds": seconds_of(eta),
                "whole_run": whole,
                "whole_run_seconds": seconds_of(whole.removesuffix(" left")),
            }
        elif match := _STEP_LINE.match(line):
            place, of, name, what = match.groups()
            return {"name": name, "place": int(place), "of": int(of), "what": what}, iteration
    return None, iteration


def exact_figures(run_folder: Path, step: str) -> dict[str, Any]:
    """Return the figures of the run's heartbeat, which are newer than the log's; nothing where it
    is of another step than `step`."""
    from megatron_hypenet.supervision import heartbeat

    beat = heartbeat.content_of(heartbeat.file_of(run_folder / heartbeat.FOLDER, 0))
    if beat.get("stage") != step or "tokens_per_second" not in beat:
        return {}
    names = {"iteration": "number", "train_iters": "of"}
    kept = ("iteration", "train_iters", "loss", "tokens_per_second", "eta_seconds")
    return {names.get(key, key): beat[key] for key in kept if key in beat}


def number_of(text: str) -> float | None:
    """Return the number that `short_count` wrote, e.g. 2600.0 for 2.6k; None for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)", text)
    if match is None:
        return None
    return float(match.group(1)) * {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}[match.group(2)]


def seconds_of(text: str) -> float | None:
    """Return the seconds that `short_time` wrote, e.g. 3720.0 for 1h02m; None for anything else."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if match is None or not text:
        return None
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds


def last_save(run_folder: Path) -> dict[str, Any] | None:
    """Return the checkpoint of the run that was committed last, and how many seconds ago."""
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


def state_lines(found: dict[str, Any]) -> list[str]:
    """Return what is known of the run as a whole: its state, since when, why, and how it goes
    on."""
    from megatron_hypenet.training.short_text import short_time

    seconds = found["seconds_ago"]
    runs = found["state"] in ("running", "waiting")
    when = "" if seconds is None else f" {'for' if runs else ''} {short_time(seconds)}"
    when += "" if seconds is None or runs else " ago"
    details = [" ".join(filter(None, (found["where"], when.strip()))), found["why"]]
    lines = [f"  {found['state']:<12} {': '.join(filter(None, details))}".rstrip()]
    lines += [f"  go on with   {found['go_on']}"] if found["go_on"] else []
    return lines


def speed_of(iteration: Mapping[str, Any], *, runs: bool) -> str:
    """Say the speed of a training stage, and how long it and the run still take while they run."""
    from megatron_hypenet.training.short_text import short_count, short_time

    speed = iteration["tokens_per_second"]
    said = f"{'unknown' if speed is None else short_count(speed)} tokens/s"
    if not runs:
        return f"{said} when it last ran"
    eta = iteration["eta_seconds"]
    whole = f"; whole run: {iteration['whole_run']}" if iteration["whole_run"] else ""
    return f"{said}, this stage: {'time' if eta is None else short_time(eta)} left{whole}"


def lines_of(found: dict[str, Any]) -> list[str]:
    """Format `status_of` as readable text."""
    from megatron_hypenet.training.short_text import short_time

    lines = [found["run"], *state_lines(found)]
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
    for row in found["faulty_nodes"]:
        what = "left out" if row["left_out"] else "suspect"
        lines.append(
            f"  {what:<12} {row['node']}: {row['why']}, {short_time(row['seconds_ago'])} ago"
        )
    from megatron_hypenet.cluster.run_state import RUNNING

    step, iteration, save = found["step"], found["iteration"], found["last_save"]
    lines.append(
        f"  step         {step['name']} ({step['place']}/{step['of']}): {step['what']}"
        if step
        else "  step         none has begun"
    )
    if iteration and step and "done" not in step["what"]:
        loss = "" if iteration["loss"] is None else f", loss {iteration['loss']:.4g}"
        lines.append(f"  iteration    {iteration['number']}/{iteration['of']}{loss}")
        lines.append(f"  speed        {speed_of(iteration, runs=found['state'] == RUNNING)}")
    lines.append(
        f"  last save    {save['checkpoint']}, {short_time(save['seconds_ago'])} ago"
        if save
        else "  last save    none yet"
    )
    lines.append(f"  finished     {', '.join(found['finished']) or 'nothing yet'}")
    lines += [f"  problem      {found['problem']}"] if found["problem"] else []
    return lines
