"""The fault that ended a process of a run: recorded where users and `hypenet logs` find it, and
distinguished from its consequences on other ranks.

When one process fails, the collectives of the others fail too, with messages such as "Connection
closed by peer" (an echo). The cause is the fault of the process that failed by itself. Each process
leaves a record (fault_record.py).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_hypenet.config.schema import GuardConfig, HeadStageConfig, StageConfig
from megatron_hypenet.errors import (
    HangError,
    HypenetError,
    LayoutError,
    PeerError,
    SavedAndRequeue,
    exit_code_of,
)
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.agreement import from_first
from megatron_hypenet.process_place import host_name
from megatron_hypenet.supervision import heartbeat
from megatron_hypenet.supervision.fault_record import (
    FaultRecord,
    attempt_file,
    read_record,
    record_of,
)
from megatron_hypenet.supervision.hang_watchdog import HangWatch, suspects
from megatron_hypenet.supervision.heartbeat import PROGRESS, Beat, Writer

FOLDER = "errors"

_LOST_PEER = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|remote process exited|ncclRemoteError"
    r"|NCCL communicator was aborted|(recv|send)(Value|Bytes|Vector).*fail|failed to (recv|send)",
    re.IGNORECASE,
)
"""Messages of gloo, NCCL and torch's store when a peer has ended."""
_TIMED_OUT = re.compile(
    r"Timed out waiting|Watchdog caught collective operation timeout"
    r"|(wait|operation|barrier|Socket).{0,40} time(d )?out",
    re.IGNORECASE,
)

_SECONDS_FOR_THE_CAUSE = 3.0
"""How long a process with an echo waits for the record of the process that failed first."""
_SECONDS_TO_LEAVE = 90.0


def lost_peer(fault: BaseException) -> bool:
    """Return whether an error of a library says that another process has ended."""
    return (
        isinstance(fault, RuntimeError)
        and not isinstance(fault, HypenetError)
        and bool(_LOST_PEER.search(str(fault)))
    )


def timed_out(fault: BaseException) -> bool:
    """Return whether an error of a library is a timeout of waiting for other processes."""
    return (
        isinstance(fault, RuntimeError)
        and not isinstance(fault, HypenetError)
        and bool(_TIMED_OUT.search(str(fault)))
    )


@dataclass(frozen=True, slots=True)
class Place:
    """This process and this start of a run, and the places of their records."""

    root: Path
    attempt_id: str
    rank: int
    world_size: int

    @property
    def errors(self) -> Path:
        """Return the folder of the records."""
        return self.root / FOLDER

    @property
    def heartbeats(self) -> Path:
        """Return the folder of the heartbeats."""
        return self.root / heartbeat.FOLDER

    def file_of(self, rank: int) -> Path:
        """Return the record of `rank`."""
        return self.errors / f"rank_{rank:05d}.json"

    def record(self, fault: BaseException) -> None:
        """Record the fault that ends this process, in the run folder and beside the logs of a SLURM
        job; the first record of this start stays."""
        path = self.file_of(self.rank)
        if self._read(path) is not None:
            return
        record = record_of(
            fault,
            rank=self.rank,
            life=self.attempt_id,
            stage=PROGRESS.stage,
            phase=PROGRESS.phase,
            iteration=PROGRESS.iteration,
            train_iters=PROGRESS.train_iters,
            echo=isinstance(fault, PeerError) or lost_peer(fault),
        )
        record.write(path)
        if (beside := attempt_file(self.rank)) is not None:
            record.write(beside)

    def causes(self) -> list[FaultRecord]:
        """Return the records of this start of the run that are no echoes, the earliest first."""
        found = [self._read(path) for path in sorted(self.errors.glob("rank_*.json"))]
        return sorted(
            (record for record in found if record is not None and not record.echo),
            key=lambda record: record.time,
        )

    def _read(self, path: Path) -> FaultRecord | None:
        """Return a record of this start; None when there is none, it is incomplete, or it belongs
        to another start."""
        record = read_record(path)
        return record if record is not None and record.life == self.attempt_id else None


@contextmanager
def watched(root: Path, guard: GuardConfig) -> Iterator[None]:
    """Run the block with a heartbeat, hang detection, and a record of the fault that ends it, for
    the run in folder `root`. Collective.

    Errors of libraries about a peer that ended or does not answer are raised as PeerError or
    HangError, with the cause where it is known.
    """
    attempt_id = from_first(f"{time.time():.3f}-{os.getpid()}")
    place = Place(root, attempt_id, groups.rank(), groups.world_size())
    interval = min(5.0, guard.hang_timeout_seconds / 4)
    writer = Writer(
        place.heartbeats,
        attempt_id=attempt_id,
        rank=place.rank,
        world_size=place.world_size,
        interval=interval,
    )
    watch = HangWatch(writer, guard.hang_timeout_seconds, place.errors, record=place.record)
    PROGRESS.note("start")
    writer.start()
    watch.start()
    previous = _Current.place
    _Current.place = place
    try:
        yield
    except BaseException as fault:
        translated = explained(fault, place)
        stopped = isinstance(translated, SavedAndRequeue)
        if place.world_size > 1:
            watch.expect_end(exit_code_of(translated), _SECONDS_TO_LEAVE)
        else:
            watch.stop()
        if not stopped:
            place.record(translated)
        writer.stop("stopped" if stopped else "failed")
        if translated is not fault:
            raise translated from fault
        raise
    else:
        watch.stop()
        writer.stop("done")
    finally:
        _Current.place = previous


class _Current:
    """The place that `watched` has set up."""

    place: Place | None = None


def record_now(fault: BaseException) -> None:
    """Record a fault where it is first seen, before anything is closed; without effect outside
    `watched`."""
    if (
        _Current.place is not None
        and not isinstance(fault, SavedAndRequeue)
        and isinstance(fault, Exception | KeyboardInterrupt)
    ):
        # an echo is explained first, which takes a while
        if not (timed_out(fault) or lost_peer(fault)):
            _Current.place.record(fault)


def out_of_gpu_memory(fault: BaseException, config: StageConfig) -> LayoutError | None:
    """Return what to do about a training stage with settings `config` that does not fit the GPU;
    None for any other fault."""
    if not isinstance(fault, torch.OutOfMemoryError):
        return None
    stage = PROGRESS.stage
    can_recompute = isinstance(config, HeadStageConfig)
    recompute = f"{stage}.recompute=selective or full, " if can_recompute else ""
    return LayoutError(
        f"rank {groups.rank()} on {host_name()} ran out of GPU memory in {_here()}: "
        f"{_first_line(fault)}\n"
        f"  less memory take a smaller {stage}.micro_batch_size, {recompute}parallel.zero_stage=2 "
        "or 3, more tensor or context "
        "parallelism;\n  `hypenet plan` shows what each part takes and which layouts fit. "
        "Start the same command with any of these: it "
        "goes on from the last save"
    )


def explained(fault: BaseException, place: Place) -> BaseException:
    """Return `fault`, or for an echo the error that names its cause."""
    if place.world_size == 1:
        return fault
    if timed_out(fault):
        return _hang(fault, place)
    return _peer(fault, place) if lost_peer(fault) else fault


def _hang(fault: BaseException, place: Place) -> HangError:
    beats, silent = heartbeat.find_silent_ranks(
        lambda: heartbeat.read_all(place.heartbeats, place.attempt_id, place.world_size),
        lambda: time.sleep(_SECONDS_FOR_THE_CAUSE),
    )
    lines = suspects(beats, silent, place.world_size)
    return HangError(
        "\n  ".join(
            [f"rank {place.rank} timed out waiting in {_here()}: {_first_line(fault)}", *lines]
        )
    )


def _peer(fault: BaseException, place: Place) -> HypenetError:
    said = (
        f"while rank {place.rank} on {host_name()} waited for it in {_here()} "
        f"({_first_line(fault)})"
    )
    deadline = time.monotonic() + _SECONDS_FOR_THE_CAUSE
    while True:
        causes = place.causes()
        beats = heartbeat.read_all(place.heartbeats, place.attempt_id, place.world_size)
        over = time.monotonic() > deadline
        if causes:
            first = causes[0]
            where = heartbeat.position(first.stage, first.phase, first.iteration, first.train_iters)
            return PeerError(
                f"rank {first.rank} on {first.host} failed in {where}: {first.error}\n"
                f"  traceback: {place.file_of(first.rank)}. "
                f"This process ended {said}"
            )
        stopped = [beat for beat in beats.values() if beat.state == "stopped"]
        if stopped and over:
            return SavedAndRequeue(
                f"{stopped[0].who()} left on request {said}; start the same command again to "
                "continue"
            )
        killed = [
            beat
            for beat in beats.values()
            if beat.state == "running" and beat.rank != place.rank and heartbeat.is_dead(beat)
        ]
        if killed and (over or not stopped):
            return PeerError(_killed(killed, said))
        if over:
            return PeerError(
                f"another process of this run ended {said}, and none has written down why. "
                "A process that the kernel kills (out of memory) "
                "or whose node fails cannot; see the log of the job and of the other ranks"
            )
        time.sleep(0.1)


def _killed(killed: list[Beat], said: str) -> str:
    return (
        f"{killed[0].who()} was killed, leaving no error record (last heartbeat: "
        f"{killed[0].where()}), {said}. It ran out of memory, which the "
        "kernel's log would show, or was killed by hand"
    )


def _here() -> str:
    return heartbeat.position(
        PROGRESS.stage, PROGRESS.phase, PROGRESS.iteration, PROGRESS.train_iters
    )


def _first_line(fault: BaseException) -> str:
    text = str(fault).strip().split("\n")[0]
    # without the library's source file and advice
    return re.sub(r"^\[[^\]]*\]\s*", "", text).split(". ")[0][:200]
