"""The progress of every process of a run: kept in memory, and written by a thread to <run
folder>/heartbeat/rank_00000.json.

Recording progress costs a clock reading and no communication. The files are for `hypenet status`,
for users, and for the report of a hang (hang_watchdog.py). A file is replaced as a whole every few
seconds while the process runs, and once more when it ends. Its fields:

    life             names this start of the run: the same on all ranks, another after a restart
    rank, world_size, host, pid
    state            running; at the end done, stopped (saved on request), failed or hung
    time             seconds since 1970 when it was written, by the clock of `host`
    beats            how often it was written: whoever cannot trust `time` reads twice, and looks
                     whether this has grown
    stage, phase     step of HALO, and what of it is being done; see PHASES
    iteration, train_iters   finished steps of a training stage, and all of them
    silent_seconds   since the main thread last noted that it got further

While a stage trains, also loss (null after a skipped step), tokens_per_second, eta_seconds,
skipped_steps, last_save (folder), last_save_time (seconds since 1970), step_seconds,
evaluate_seconds, save_seconds and grace_seconds (see grace_period.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_hypenet.atomic_files import replacing
from megatron_hypenet.errors import DataError
from megatron_hypenet.process_place import host_name
from megatron_hypenet.untrusted.files import FileKind
from megatron_hypenet.untrusted.json_text import read_object, typed

FOLDER = "heartbeat"
_KIND = FileKind(
    error=DataError, advice="it is written again while the process lives", max_bytes=1 << 20
)

PHASES = {
    "start": "before the first step of HALO",
    "waiting": "the first process works alone, the others wait for it",
    "alone": "the first process works alone: import, tokenizing, assembly, export",
    "build": "models and optimizer are made",
    "load": "a checkpoint is read",
    "data": "the samples of a step are read",
    "forward-backward": "one micro-batch after the other, with the collectives of model "
    "parallelism and ZeRO",
    "reduce": "gradients and loss are summed over the processes",
    "update": "the norm of all gradients, and the optimizer's step",
    "evaluate": "a model is measured",
    "edge": "after a step: the processes agree on requests from outside",
    "save": "a checkpoint is written",
}
"""Phase -> meaning, in the order of a stage."""

_ORDER = {phase: place for place, phase in enumerate(PHASES)}


@dataclass
class ProgressState:
    """The progress of this process. The main thread writes, others read; every attribute is
    replaced as a whole."""

    stage: str = ""
    phase: str = "start"
    iteration: int = 0
    train_iters: int = 0
    begun: int = 0
    """Number of stages begun so far, by which ranks are compared."""
    warm: bool = False
    """Whether this process has finished a step of the present stage: from then on nothing more is
    compiled or connected."""
    moved: float = field(default_factory=time.monotonic)
    facts: dict[str, Any] = field(default_factory=dict)
    """Further fields for a training stage."""

    def begin(self, stage: str, *, iteration: int = 0, train_iters: int = 0) -> None:
        """Record that the main thread begins a stage."""
        self.stage = stage
        self.iteration = iteration
        self.train_iters = train_iters
        self.warm = False
        self.facts = {}
        self.begun += 1
        self.note("build")

    def note(self, phase: str) -> None:
        """Record progress of the main thread: it enters `phase`, or begins the next part of it."""
        self.phase = phase
        self.moved = time.monotonic()

    @contextmanager
    def doing(self, phase: str) -> Iterator[None]:
        """Run a block as another phase; a fault in it leaves the phase unchanged, for the record of
        the fault."""
        before = self.phase
        self.note(phase)
        yield
        self.note(before)

    def finish_step(self, iteration: int, **facts: Any) -> None:
        """Record that a training step is done."""
        self.iteration, self.warm, self.facts = iteration, True, {**self.facts, **facts}
        self.note("edge")

    def silent_seconds(self) -> float:
        """Return the seconds since the main thread last recorded progress."""
        return time.monotonic() - self.moved


PROGRESS = ProgressState()
"""The progress of this process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """One rank's file, as another process reads it."""

    rank: int
    host: str
    pid: int
    state: str
    beats: int
    begun: int
    stage: str
    phase: str
    iteration: int
    train_iters: int
    silent_seconds: float

    @property
    def place(self) -> tuple[int, int, int]:
        """Return its progress as a tuple that grows during a run."""
        return self.begun, self.iteration, _ORDER.get(self.phase, 0)

    def who(self) -> str:
        """Return the rank with its place, e.g. "rank 3 on node7 (pid 4711)"."""
        return f"rank {self.rank} on {self.host} (pid {self.pid})"

    def where(self) -> str:
        """Return where the rank is in its work, e.g. "iteration 5/100 of distill,
        forward-backward"."""
        return position(self.stage, self.phase, self.iteration, self.train_iters)


def position(stage: str, phase: str, iteration: int, train_iters: int) -> str:
    """Return the progress of a process in words; `iteration` is the number of finished steps."""
    if not stage:
        return phase
    return (
        f"iteration {min(iteration + 1, train_iters)}/{train_iters} of {stage}, {phase}"
        if train_iters
        else f"{stage}, {phase}"
    )


def file_of(folder: Path, rank: int) -> Path:
    """Return the file of `rank` in the heartbeat folder of a run."""
    return folder / f"rank_{rank:05d}.json"


def content_of(path: Path) -> dict[str, Any]:
    """Return all fields of one file, of whatever start; empty when it is missing or incomplete."""
    try:
        return read_object(_KIND, path)
    except DataError:
        return {}


def read_beat(path: Path, attempt_id: str) -> Beat | None:
    """Return the content of one file; None when it is missing, incomplete, or of another start of
    the run."""
    try:
        content = read_object(_KIND, path)
        return typed(_KIND, path, content, Beat) if content.get("life") == attempt_id else None
    except DataError:
        return None


def read_all(folder: Path, attempt_id: str, world_size: int) -> dict[int, Beat]:
    """Return the files of all ranks of this start of the run, by rank."""
    found = {rank: read_beat(file_of(folder, rank), attempt_id) for rank in range(world_size)}
    return {rank: beat for rank, beat in found.items() if beat is not None}


class Writer:
    """The thread that writes this process's file. A disk that is full or hangs stops heartbeats
    only."""

    def __init__(
        self,
        folder: Path,
        *,
        attempt_id: str,
        rank: int,
        world_size: int,
        interval: float,
        progress: ProgressState = PROGRESS,
    ) -> None:
        self.folder = folder
        self.attempt_id = attempt_id
        self.rank = rank
        self.world_size = world_size
        self.interval = interval
        self.progress = progress
        self.state = "running"
        self.beats = 0
        self._stop = threading.Event()
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Write the file, and continue in a background thread."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write()
        self._thread.start()

    def stop(self, state: str) -> None:
        """Write the file for the last time, with the state in which this process ends."""
        self._stop.set()
        self.state = state
        self.write()

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            self.write()

    def content(self) -> dict[str, Any]:
        """Return the fields of the file."""
        progress = self.progress
        return {
            "life": self.attempt_id,
            "rank": self.rank,
            "world_size": self.world_size,
            "host": host_name(),
            "pid": os.getpid(),
            "state": self.state,
            "time": round(time.time(), 3),
            "beats": self.beats,
            "begun": progress.begun,
            "stage": progress.stage,
            "phase": progress.phase,
            "iteration": progress.iteration,
            "train_iters": progress.train_iters,
            "silent_seconds": round(progress.silent_seconds(), 3),
            **progress.facts,
        }

    def write(self) -> None:
        """Replace the file."""
        with self._writing, contextlib.suppress(OSError):
            self.beats += 1
            with replacing(file_of(self.folder, self.rank), durable=False) as temporary:
                temporary.write_text(json.dumps(self.content()) + "\n", encoding="utf-8")


def is_dead(beat: Beat) -> bool:
    """Return whether the process of `beat` is known to have ended; only its own machine can find
    out."""
    if beat.host != host_name():
        return False
    try:
        status = Path(f"/proc/{beat.pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return Path("/proc/self").exists()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] in ("Z", "X")


def find_silent_ranks(
    read: Callable[[], dict[int, Beat]], pause: Callable[[], None]
) -> tuple[dict[int, Beat], set[int]]:
    """Return (the newest beat of each rank, the ranks that no longer write), from two readings with
    `pause` between them."""
    before = read()
    pause()
    after = read()
    silent = {
        rank
        for rank, beat in after.items()
        if beat.state == "running" and rank in before and beat.beats == before[rank].beats
    }
    return after, silent
