"""Nodes that a run leaves out by itself, because `hypenet doctor` or its own faults named them.

`requeue.exclude_faulty` of the cluster profile is the most nodes that are left out this way, 0 by
default. What is known is looked for anew at each `submit` and `requeue`: in the records of the
run's jobs and in its log, and in FILE of the run's folder and of the one above it, where
`hypenet doctor --note` writes. `hypenet requeue --include NODE` forgives a node: what was known of
it until then no longer counts.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hypenet.atomic_files import write_json
from megatron_hypenet.cluster.first_error import Fault, faults_of
from megatron_hypenet.errors import DataError
from megatron_hypenet.untrusted.files import FileKind, has_entry
from megatron_hypenet.untrusted.json_text import read_typed

if TYPE_CHECKING:
    from megatron_hypenet.cluster.jobs import Jobs

FILE = "faulty_nodes.json"
SLOW_LINES = 3
"""Lines of a run's log that have to name a node as slow; each is of an interval of steps, and the
comparison itself asks for several."""
KILLED_STARTS = 2
"""Starts of jobs in which tasks on a node were killed. Once may be the program's memory."""

_KIND = FileKind(error=DataError, advice="delete it to forget these nodes")
_NAME = re.compile(r"[\w.-]+", re.ASCII)
_LOST = re.compile(r"its node failed")
_HUNG = re.compile(r"on (\S+) \(pid \d+\) does not answer")
_DEVICE = re.compile(
    r"uncorrectable ECC|fallen off the bus|GPU is lost|no CUDA-capable device|Input/output error"
)
_KILLED = re.compile(r"^task ended by a signal")
# lines of logs/hypenet.log: "TIME iter 20/300 | ... | slow: rank 3 on n7 1.6x, rank 4 on n7 1.5x"
_SLOW = re.compile(r"^(\S+)\s+iter .* \| slow: (.*?)(?: \| |$)")
_SLOW_RANK = re.compile(r"rank \d+ on (\S+) ")


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultyNode:
    """One node and what is held against it."""

    node: str
    why: str
    time: float
    """When it was last seen, in seconds since 1970."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Content:
    """The content of FILE."""

    nodes: tuple[FaultyNode, ...] = ()
    forgiven: tuple[FaultyNode, ...] = ()
    """Nodes and until when nothing counts that was held against them."""


def note(folder: Path, nodes: Iterable[FaultyNode]) -> None:
    """Add nodes to FILE in `folder`; a later entry of a node replaces an earlier one."""
    content = _read(folder)
    kept = {one.node: one for one in (*content.nodes, *nodes)}
    _write(folder, _Content(nodes=tuple(kept.values()), forgiven=content.forgiven))


def forgive(folder: Path, nodes: Sequence[str]) -> None:
    """Let nothing count any more that is held against these nodes now."""
    content = _read(folder)
    kept = {one.node: one for one in content.forgiven}
    kept |= {node: FaultyNode(node=node, why="forgiven", time=time.time()) for node in nodes}
    _write(folder, _Content(nodes=content.nodes, forgiven=tuple(kept.values())))


def faulty(jobs: Jobs) -> list[FaultyNode]:
    """Return the nodes that something is held against, the last seen first."""
    folder = jobs.folder
    own = _read(folder)
    forgiven = {one.node: one.time for one in own.forgiven}
    found: dict[str, FaultyNode] = {}
    noted = (*own.nodes, *_read(folder.absolute().parent).nodes)
    for one in (*noted, *_of_jobs(jobs), *_slow(folder / "logs" / "hypenet.log")):
        known = found.get(one.node)
        newer = known is None or one.time > known.time
        named = _NAME.fullmatch(one.node) is not None
        if named and newer and one.time > forgiven.get(one.node, 0.0):
            found[one.node] = one
    return sorted(found.values(), key=lambda one: -one.time)


def left_out(jobs: Jobs, limit: int) -> tuple[str, ...]:
    """Return the nodes to leave out: of those that something is held against the `limit` that were
    seen last, so that what is common to all nodes does not take the whole cluster away."""
    return tuple(one.node for one in faulty(jobs)[:limit]) if limit else ()


def _of_jobs(jobs: Jobs) -> Iterator[FaultyNode]:
    """Yield the nodes that starts of the run's jobs ended for."""
    killed: dict[str, set[Path]] = {}
    for job in jobs.all:
        for start in jobs.attempts(job):
            moment = start.stat().st_mtime
            for fault in faults_of(start, jobs.log(job)):
                if (node := _blamed(fault)) is not None:
                    why = fault.error.splitlines()[0][:200]
                    yield FaultyNode(node=node, why=why, time=fault.time or moment)
                elif _KILLED.match(fault.error):
                    starts = killed.setdefault(fault.host, set())
                    starts.add(start)
                    if len(starts) >= KILLED_STARTS:
                        why = f"tasks on it were killed in {len(starts)} starts"
                        yield FaultyNode(node=fault.host, why=why, time=moment)


def _blamed(fault: Fault) -> str | None:
    """Return the node whose fault this is, None for errors that another node would make too."""
    if match := _HUNG.search(fault.error):
        return match.group(1)
    own = _LOST.search(fault.error) or _DEVICE.search(fault.error)
    return fault.host if own and fault.host not in ("", "?") else None


def _slow(log: Path) -> Iterator[FaultyNode]:
    """Yield the nodes that the run's log has named as slow often enough."""
    if not log.is_file():
        return
    times: dict[str, list[float]] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if match := _SLOW.match(line):
            for node in set(_SLOW_RANK.findall(f"{match.group(2)} ")):
                times.setdefault(node, []).append(_seconds(match.group(1)))
    for node, found in times.items():
        if len(found) >= SLOW_LINES:
            why = f"it slowed the others down in {len(found)} intervals"
            yield FaultyNode(node=node, why=why, time=found[-1])


def _seconds(stamp: str) -> float:
    """Return the time of a line of the log; 0 for a stamp that is none."""
    try:
        return datetime.fromisoformat(stamp).timestamp()
    except ValueError:
        return 0.0


def _read(folder: Path) -> _Content:
    """Return the content of FILE in `folder`. Raises DataError where it is damaged."""
    file = folder / FILE
    return read_typed(_KIND, file, _Content) if has_entry(file) else _Content()


def _write(folder: Path, content: _Content) -> None:
    write_json(folder / FILE, asdict(content))
