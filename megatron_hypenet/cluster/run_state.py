"""Whether a run is being worked on, and if not, why and how it goes on: with SLURM or without.

Not a verb: status, runs, logs and cancel share it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hypenet.cluster.first_error import Fault, Group, grouped
from megatron_hypenet.errors import DataError
from megatron_hypenet.ownership import owner_of
from megatron_hypenet.process_place import host_name
from megatron_hypenet.supervision.fault_record import FaultRecord, read_record
from megatron_hypenet.supervision.start_record import StartRecord, read_start

if TYPE_CHECKING:
    from megatron_hypenet.cluster.jobs import Job, JobState

RUNNING = "running"
LAST_STEP = "report"
"""The step with which a run is done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """What is known of a run from outside."""

    state: str
    """running, waiting (in SLURM's queue), stopped, failed, killed, done, ended (a command that
    does a part of the run has done it), or new."""
    where: str = ""
    """Process and host, or job and nodes, while it runs."""
    host: str = ""
    pid: int = 0
    why: str = ""
    seconds_ago: float | None = None
    """Since it began, while it runs; else since it ended."""
    go_on: str = ""
    """The command that continues it; empty while it runs and when it is done."""


def state_of(
    folder: Path,
    finished: Sequence[str],
    jobs: Sequence[Job] = (),
    states: Mapping[int, JobState] | None = None,
) -> RunState:
    """Return the state of the run in `folder`, whose steps `finished` are recorded, with SLURM's
    `states` of its `jobs` where it has any."""
    known = states or {}
    for job in jobs:
        if (state := known.get(job.id)) is not None and state.live:
            word = "waiting" if state.state == "PENDING" else RUNNING
            where = f"SLURM job {job.id}" + (f" on {state.nodes}" if state.nodes else "")
            return RunState(state=word, where=where, why=state.reason)
    owner, lives = owner_of(folder)
    start = read_start(folder)
    if owner is not None and lives is not False:
        return RunState(
            state=RUNNING,
            where=f"process {owner.pid} on {owner.host}",
            host=owner.host,
            pid=owner.pid,
            seconds_ago=_since(start.began) if start is not None else None,
        )
    return _at_rest(folder, finished, start, by_slurm=bool(jobs))


def _at_rest(
    folder: Path, finished: Sequence[str], start: StartRecord | None, *, by_slurm: bool
) -> RunState:
    """Return the state of a run that nobody works on."""
    again = f"hypenet requeue {folder}" if by_slurm else f"hypenet run {folder}/config.yaml"
    if start is not None and not start.job:
        again = (
            start.command
            if start.folder == str(Path.cwd())
            else (f"cd {start.folder} && {start.command}")
        )
    if LAST_STEP in finished and (start is None or start.state == "done"):
        return RunState(state="done", seconds_ago=_since(start.ended) if start else None)
    if start is None:
        if not finished:
            return RunState(state="new", go_on=again)
        return RunState(state="stopped", why="no start of it is recorded", go_on=again)
    if start.state == "done":
        return RunState(
            state="ended",
            why=f"`{start.command}` has done its part",
            seconds_ago=_since(start.ended),
            go_on=f"hypenet run {folder}/config.yaml",
        )
    if start.state == "running":
        return RunState(
            state="killed",
            why=f"process {start.pid} on {start.host} is gone and left no word: it was killed, "
            "perhaps for memory, or its machine went down",
            go_on=again,
        )
    return RunState(
        state=start.state, why=start.reason, seconds_ago=_since(start.ended), go_on=again
    )


def is_here(state: RunState) -> bool:
    """Return whether the process that works on the run is one of this machine."""
    return state.pid > 0 and state.host == host_name()


def local_faults(folder: Path) -> list[Group]:
    """Return what failed in the last start of a run without SLURM, causes first; from the records
    of its processes, else from that of the start."""
    records = [
        record
        for path in sorted((folder / "errors").glob("rank_*.json"))
        if (record := read_record(path)) is not None
    ]
    start = read_start(folder)
    began = start.began if start is not None else 0.0
    newest = max((record for record in records), key=lambda record: record.time, default=None)
    if newest is not None and newest.time >= began:
        return grouped(_fault(record) for record in records if record.life == newest.life)
    if start is None or start.state not in ("failed", "running") or not start.reason:
        return []
    return [
        Group(faults=(Fault(rank=0, host=start.host, time=start.ended or 0, error=start.reason),))
    ]


def _fault(record: FaultRecord) -> Fault:
    return Fault(
        rank=record.rank,
        host=record.host,
        time=record.time,
        error=record.error,
        traceback=record.traceback,
        echo=record.echo,
    )


def _since(moment: float | None) -> float | None:
    return None if moment is None else round(max(0.0, time.time() - moment), 1)


def run_folders(top: Path, depth: int = 3) -> list[Path]:
    """Return the run folders at or below `top`, at most `depth` levels down; runs inside of runs
    are not looked for. Raises DataError where `top` is no folder."""
    if not top.is_dir():
        raise DataError(f"{top} is not a folder; give the folder that holds your runs")
    if _is_run(top):
        return [top]
    found: list[Path] = []
    for entry in sorted(top.iterdir()):
        if depth > 0 and entry.is_dir() and not entry.name.startswith("."):
            try:
                found += run_folders(entry, depth - 1)
            except OSError:
                continue  # a folder of somebody else
    return found


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and any(
        (folder / name).exists() for name in ("manifest.json", "jobs.json", "logs", "start.json")
    )
