"""Find the first error of a job of many processes: equal faults together, causes before their
consequences, with host and rank.

Not a verb: `hypenet logs --first-error` shows it. Sources, per start of a job: the records that
failing tasks leave (supervision/fault_record.py), tracebacks in the rank logs of those that left
none, and srun's lines about tasks that were killed. Where no task has left anything, the job log is
used: errors of srun and slurmstepd, such as why no task could start.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hypenet.errors import DataError, SavedAndRequeue
from megatron_hypenet.untrusted.files import FileKind
from megatron_hypenet.untrusted.json_text import read_typed

_RECORD = FileKind(error=DataError, advice="it is only for people")

# messages of a process whose peer ended; the peer's record has the cause
_ECHO = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|recvBytes|sendBytes|socket.*(closed|reset)"
    r"|NCCL.*remote|remote process exited|DistNetworkError|DistStoreError|store->get"
    r"|Socket Timeout",
    re.IGNORECASE,
)
# srun: error: n2: task 1: Killed
# srun: error: n[1-2]: tasks 0-3,7: Exited with exit code 1
_SRUN = re.compile(r"^srun: error: (\S+): tasks? ([\d,-]+): (.*)$")
_NODE_FAILURE = re.compile(r"^srun: error: Node failure on (\S+)")
_ENDS_THE_OTHERS = "Terminating StepId"
_HEADER = re.compile(r"^node (\S+) attempt \d+ RANK=(\d+)\b")
# srun: fatal: SLURM_MEM_PER_CPU, ... are mutually exclusive.
# slurmstepd-n1: error: execve(): python3: No such file or directory
# A job that is cancelled, preempted or at its time limit is no error, nor is a task that has saved
# and asks for another start.
_SLURMS_OWN = re.compile(
    r"^(?:srun|slurmstepd(?:-\S+)?): (?:error|fatal): "
    rf"(?!\*\*\* (?:JOB|STEP) )(?!.*Exited with exit code {SavedAndRequeue.exit_code}$)"
)
_FATAL = re.compile(rf"^Fatal Python error: .*|^terminate called.*|{_SLURMS_OWN.pattern}.*")
_LONGEST_LIST = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """The error with which one rank ended."""

    rank: int | None
    """None for an error of SLURM itself."""
    host: str
    time: float
    """Seconds since 1970; 0 where only the order is known, which srun's lines give."""
    error: str
    traceback: str = ""
    echo: bool = False
    """Whether the rank's own record says that it failed only because another one did."""

    @property
    def kind(self) -> str:
        """Return a key that is equal for ranks that failed in the same way: the text without its
        numbers and addresses."""
        return re.sub(r"0x[0-9a-fA-F]+|\d+", "#", self.traceback or self.error)

    @property
    def is_echo(self) -> bool:
        """Return whether the error only says that another process has ended."""
        return self.echo or bool(_ECHO.search(self.error))


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Ranks that ended with the same error."""

    faults: tuple[Fault, ...]

    @property
    def first(self) -> Fault:
        """Return the earliest of them."""
        return self.faults[0]

    def who(self) -> str:
        """Return the ranks with their hosts, e.g. "31 ranks on 4 nodes (n1: 0-7, n2: 8-15,
        ...)"."""
        if self.first.rank is None:
            return "SLURM"
        hosts: dict[str, list[int]] = {}
        for rank, host in sorted(
            (fault.rank, fault.host) for fault in self.faults if fault.rank is not None
        ):
            hosts.setdefault(host, []).append(rank)
        if len(self.faults) == 1:
            return f"rank {self.first.rank} on {self.first.host}"
        listed = [f"{host}: {ranges(ranks)}" for host, ranks in hosts.items()]
        more = f", and {len(listed) - _LONGEST_LIST} more" if len(listed) > _LONGEST_LIST else ""
        plural = "s" if len(hosts) > 1 else ""
        return (
            f"{len(self.faults)} ranks on {len(hosts)} node{plural} "
            f"({', '.join(listed[:_LONGEST_LIST])}{more})"
        )

    def as_json(self) -> dict[str, Any]:
        """Return the group as plain data for --json."""
        return {
            "ranks": sorted(fault.rank for fault in self.faults if fault.rank is not None),
            "hosts": sorted({fault.host for fault in self.faults if fault.rank is not None}),
            "error": self.first.error,
            "traceback": self.first.traceback,
            "echo": self.first.is_echo,
        }


def grouped(faults: Iterable[Fault]) -> list[Group]:
    """Put equal faults together; causes before echoes, then by time of the earliest."""
    groups: dict[str, list[Fault]] = {}
    for fault in sorted(faults, key=lambda fault: (fault.time, fault.rank or 0)):
        groups.setdefault(fault.kind, []).append(fault)
    found = [Group(faults=tuple(members)) for members in groups.values()]
    return sorted(found, key=lambda group: (group.first.is_echo, group.first.time))


def faults_of(attempt_logs: Path, job_log: Path) -> list[Fault]:
    """Return every rank's fault in one start of a job; where no rank has one, SLURM's own errors in
    the job's log."""
    said = _start_of(job_log, int(attempt_logs.name.rpartition("-")[2]))
    killed, lost_nodes = _killed_and_lost(said)
    found = {fault.rank: fault for fault in killed}
    for path in sorted(attempt_logs.glob("rank-*.log")):
        host = _host_of(_lines(path))
        if host in lost_nodes:
            rank = _rank_of(path)
            found[rank] = Fault(
                rank=rank, host=host, time=0.0, error="its node failed: SLURM reached it no more"
            )
            continue
        fault = _from_rank_log(path)
        if fault is not None:
            found.setdefault(fault.rank, fault)
    for path in sorted(attempt_logs.glob("rank-*.error.json")):
        fault = _from_record(path)
        if fault is not None:
            found[fault.rank] = fault
    return list(found.values()) or _slurms_own(said)


def _slurms_own(lines: Sequence[str]) -> list[Fault]:
    """Return SLURM's errors as one fault: a fatal one if there is one, else the first, with all of
    them below."""
    own = [line for line in lines if _SLURMS_OWN.match(line)]
    if not own:
        return []
    first = next((line for line in own if ": fatal: " in line), own[0])
    return [
        Fault(
            rank=None,
            host="",
            time=0.0,
            error=first,
            traceback="\n".join(own) + "\n" if len(own) > 1 else "",
        )
    ]


def _from_record(path: Path) -> Fault | None:
    try:
        return read_typed(_RECORD, path, Fault)
    except DataError:  # incomplete: the task was killed while writing it, and srun reports that
        return None


def _from_rank_log(path: Path) -> Fault | None:
    """Return the last traceback or fatal error of a rank that left no record, e.g. because this
    package could not be imported."""
    lines, rank = _lines(path), _rank_of(path)
    host = _host_of(lines)
    for index in range(len(lines) - 1, -1, -1):
        if lines[index].startswith("Traceback (most recent call last)"):
            body = lines[index:]
            end = next(
                (
                    i
                    for i, line in enumerate(body[1:], start=1)
                    if line and not line.startswith((" ", "\t"))
                ),
                len(body) - 1,
            )
            return Fault(
                rank=rank,
                host=host,
                time=path.stat().st_mtime,
                error=body[end],
                traceback="\n".join(body[: end + 1]) + "\n",
            )
        if _FATAL.match(lines[index]):
            return Fault(
                rank=rank,
                host=host,
                time=path.stat().st_mtime,
                error=lines[index],
                traceback="\n".join(lines[index:]) + "\n",
            )
    return None


def _start_of(job_log: Path, attempt: int) -> list[str]:
    """Return the lines of the job's log from the note of one start to the next note."""
    found: list[str] = []
    inside = False
    for line in _lines(job_log):
        if f" attempt {attempt}: " in line:
            inside = " started on " in line
        elif inside:
            found.append(line)
    return found


def _killed_and_lost(lines: Sequence[str]) -> tuple[list[Fault], set[str]]:
    """Return (tasks that srun saw killed by a signal before it ended the others itself, nodes that
    SLURM lost) in one start of a job."""
    faults: list[Fault] = []
    lost: set[str] = set()
    ending = False
    for line in lines:
        if match := _NODE_FAILURE.match(line):
            lost.add(match.group(1))
            ending = True
        elif _ENDS_THE_OTHERS in line:
            ending = True  # from here on tasks are ended by srun
        elif (
            not ending and (match := _SRUN.match(line)) and not match.group(3).startswith("Exited")
        ):
            host, tasks, how = match.groups()
            faults += [
                Fault(rank=rank, host=host, time=0.0, error=f"task ended by a signal: {how}")
                for rank in numbers_of(tasks)
            ]
    return faults, lost


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _rank_of(path: Path) -> int:
    return int(re.sub(r"\D", "", path.stem) or 0)


def _host_of(lines: Sequence[str]) -> str:
    return next((match.group(1) for line in lines if (match := _HEADER.match(line))), "?")


def numbers_of(text: str) -> list[int]:
    """Expand SLURM's short form of task numbers to a list: "0-2,7" -> [0, 1, 2, 7]."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def ranges(numbers: Sequence[int]) -> str:
    """Return the short form again: [0, 1, 2, 7] -> "0-2,7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
