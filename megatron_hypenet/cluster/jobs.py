"""The SLURM jobs of a run: the submitted jobs (jobs.json in its folder), their states in SLURM, and
their own records.

Not a verb: submit, status, logs, cancel and requeue share it. SLURM forgets a job minutes after its
end, and accounting (sacct) is not everywhere; the job script therefore notes each start and end in
logs/job-ID/events.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from megatron_hypenet.checkpoint.places import is_run
from megatron_hypenet.errors import DataError, SetupError, UsageError
from megatron_hypenet.slurm_environment import own_environment
from megatron_hypenet.untrusted.files import FileKind, has_entry, inside
from megatron_hypenet.untrusted.json_text import read_typed

logger = logging.getLogger(__name__)

LIVE = frozenset(
    {
        "PENDING",
        "CONFIGURING",
        "RUNNING",
        "SUSPENDED",
        "COMPLETING",
        "REQUEUED",
        "REQUEUE_HOLD",
        "STAGE_OUT",
        "SIGNALING",
    }
)
"""SLURM's states of a job that runs or will run."""

_COMMAND_SECONDS = 60
_JOBS = FileKind(error=DataError, advice="delete it to forget the jobs of this run")
_EVENTS = FileKind(error=DataError, advice="remove it")
_EVENT = re.compile(r"(\d{1,15}(?:\.\d+)?) (\d{1,9}) (.+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One submitted job."""

    id: int
    part: str
    """Part of the run that it does, as job_script.JobScript names it."""
    script: str
    """File name of its script in the run folder."""
    submitted: str
    after: int | None = None
    """The job that has to succeed before it starts."""
    exclude: tuple[str, ...] = ()
    """Nodes it may not use, by the profile or by hand."""
    left_out: tuple[str, ...] = ()
    """Nodes that were left out by themselves (faulty_nodes.py)."""
    exclude_faulty: int = 0
    """The most nodes that may be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobState:
    """The state of a job."""

    state: str
    """SLURM's name of the state, or the state by the job's own records once SLURM has forgotten
    it."""
    live: bool
    reason: str = ""
    nodes: str = ""
    time_left: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """A line of logs/job-ID/events."""

    time: float
    attempt: int
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Jobs:
    """The content of jobs.json."""

    jobs: list[Job]


class Jobs:
    """The jobs of one run folder, oldest first."""

    def __init__(self, run_folder: Path) -> None:
        """Read the record of jobs; DataError when `run_folder` is not a run folder or its record is
        damaged."""
        if not is_run(run_folder):
            raise DataError(
                f"{run_folder} is not a run folder: it has no config.yaml of a run; give the "
                "output_dir of a run"
            )
        self.folder = run_folder
        self.file = run_folder / "jobs.json"
        self.all: list[Job] = self._read()

    def _read(self) -> list[Job]:
        if not has_entry(self.file):
            return []
        jobs = read_typed(_JOBS, self.file, _Jobs).jobs
        for job in jobs:
            inside(self.folder, job.script, _JOBS)
        return jobs

    def required(self) -> list[Job]:
        """Return all jobs; DataError when the run was never submitted."""
        if not self.all:
            raise DataError(
                f"{self.folder} has no SLURM jobs; submit it with `hypenet submit CONFIG --cluster "
                "PROFILE`"
            )
        return self.all

    def newest_of_each_part(self) -> list[Job]:
        """Return the latest job for each part of the run, in the run's order."""
        return list({job.part: job for job in self.all}.values())

    def submit(
        self,
        script: Path,
        part: str,
        *,
        after: int | None,
        exclude: Sequence[str],
        exclude_faulty: int = 0,
    ) -> Job:
        """Hand `script` to sbatch, to start once job `after` has succeeded, and remember the job;
        up to `exclude_faulty` nodes are left out beside `exclude`. Raises SetupError."""
        from megatron_hypenet.cluster.faulty_nodes import left_out

        faulty = left_out(self, exclude_faulty)
        words = ["sbatch", "--parsable"]
        if after is not None:
            words += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
        if nodes := dict.fromkeys((*exclude, *faulty)):
            words.append(f"--exclude={','.join(nodes)}")
        answer = slurm(*words, str(script))
        # "ID;CLUSTER" where several clusters share a controller
        number = answer.strip().split(";")[0]
        if not number.isdecimal():
            raise SetupError(f"sbatch {script} gave no job number but {answer!r}")
        job = Job(
            id=int(number),
            part=part,
            script=script.name,
            submitted=datetime.now(UTC).isoformat(timespec="seconds"),
            after=after,
            exclude=tuple(exclude),
            left_out=faulty,
            exclude_faulty=exclude_faulty,
        )
        self.all.append(job)
        from megatron_hypenet.atomic_files import write_json

        write_json(self.file, {"jobs": [asdict(job) for job in self.all]})
        return job

    def log(self, job: Job) -> Path:
        """Return the path of the output of the job script and of srun, all starts of the job in one
        file."""
        return self.folder / "logs" / f"job-{job.id}.log"

    def attempts(self, job: Job) -> list[Path]:
        """Return the folders with the ranks' logs, one per start, oldest first."""
        found = (self.folder / "logs" / f"job-{job.id}").glob("attempt-*")
        return sorted(
            (path for path in found if path.name[8:].isdecimal()),
            key=lambda path: int(path.name[8:]),
        )

    def events(self, job: Job) -> list[Event]:
        """Return the events that the job recorded."""
        path = self.folder / "logs" / f"job-{job.id}" / "events"
        rows = (
            _EVENTS.read_bytes(path).decode(errors="replace").splitlines()
            if has_entry(path)
            else []
        )
        # an incomplete line is ignored
        found = [match.groups() for row in rows if (match := _EVENT.fullmatch(row))]
        return [
            Event(time=float(time), attempt=int(attempt), text=text)
            for time, attempt, text in found
        ]

    def note(self, job: Job, text: str) -> None:
        """Add a line to the job's events."""
        path = self.folder / "logs" / f"job-{job.id}" / "events"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as stream:
            stream.write(
                f"{int(datetime.now(UTC).timestamp())} {max(0, len(self.attempts(job)) - 1)} "
                f"{text}\n"
            )

    def states(self) -> dict[int, JobState]:
        """Return the state of every job: SLURM's while it knows the job, else by the job's
        records."""
        known = queue([job.id for job in self.all]) if self.all else {}
        return {job.id: known.get(job.id) or self._remembered(job) for job in self.all}

    def _remembered(self, job: Job) -> JobState:
        events = self.events(job)
        if not events:
            return JobState(
                state="GONE", live=False, reason="SLURM does not know it, and it never started"
            )
        last = events[-1].text
        if last == "ended with code 0":
            return JobState(state="COMPLETED", live=False)
        return JobState(
            state="CANCELLED" if last.startswith("cancelled") else "FAILED", live=False, reason=last
        )


def refuse_live_jobs(run_folder: Path) -> None:
    """Raise UsageError while jobs of the run in this folder wait or run; without SLURM the jobs'
    own records count."""
    if not all(has_entry(run_folder / name) for name in ("jobs.json", "config.yaml")):
        return
    jobs = Jobs(run_folder)
    try:
        states = jobs.states()
    except SetupError as error:
        logger.warning(
            "%s has jobs of SLURM, which does not say whether they still run: %s", run_folder, error
        )
        return
    if live := [job.id for job in jobs.all if states[job.id].live]:
        raise UsageError(
            f"{run_folder} has jobs that are not done ({', '.join(map(str, live))}), "
            "and two would write over each other; "
            f"`hypenet status {run_folder}` shows them, `hypenet cancel {run_folder}` ends them"
        )


def queue(ids: Sequence[int]) -> dict[int, JobState]:
    """Return SLURM's states of these jobs, without those that it has forgotten. Raises
    SetupError."""
    # all of the user's jobs: asking for one that is forgotten is an error to squeue
    rows = slurm(
        "squeue", "--me", "--noheader", "--states=all", "--format=%i|%T|%r|%N|%L"
    ).splitlines()
    wanted = set(ids)
    found = {}
    for row in rows:
        number, state, reason, nodes, left = (part.strip() for part in row.split("|", 4))
        if number.isdecimal() and int(number) in wanted:
            live = state in LIVE
            found[int(number)] = JobState(
                state=state,
                live=live,
                reason="" if reason == "None" else reason,
                nodes=nodes,
                time_left=left if state == "RUNNING" else "",
            )
    return found


def slurm(
    *words: str, stdin: str | None = None, environment: Mapping[str, str] = os.environ
) -> str:
    """Return the output of a SLURM command (of both streams for sbatch --test-only, which prints to
    stderr). Raises SetupError with the command's message."""
    try:
        done = subprocess.run(
            words,
            input=stdin,
            env=own_environment(environment),
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise SetupError(
            f"{words[0]} is not installed here; run this on a login node of the SLURM cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise SetupError(
            f"{words[0]} has not answered for {_COMMAND_SECONDS} s; SLURM may be down, "
            "try again later"
        ) from None
    if done.returncode:
        raise SetupError(
            f"{' '.join(words)}: "
            f"{(done.stderr or done.stdout).strip() or f'exit code {done.returncode}'}"
        )
    return done.stdout or done.stderr
