"""Detect that this process makes no progress, report where it and the others are, and end it with
code 8.

A process that waits for ever in a collective cannot end by itself, so a thread does it. The thread
reads the main thread's progress (heartbeat.py), so every rank detects a hang by itself. Only then
are the others' files read: a rank whose file is no longer written is stopped or on a dead node; a
rank that writes but is behind is the one that the others wait for.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from megatron_hypenet.config.schema import GuardConfig
from megatron_hypenet.errors import HangError
from megatron_hypenet.process_place import host_name
from megatron_hypenet.supervision import heartbeat
from megatron_hypenet.supervision.heartbeat import Beat, ProgressState, Writer

LONG_PHASES = frozenset({"start", "build", "load", "save", "evaluate"})
"""Phases that may take longer than a micro-batch: they get twice the timeout, as the first step of
a stage does (compilation)."""

OPEN_PHASES = frozenset({"alone", "waiting"})
"""Phases of unknown length on the first process; processes that wait for it only check that it is
alive."""

_LONGEST_LIST = 8
_PATIENCE_SECONDS = 60.0
"""How long to wait for the report to be written: its disk may be what hangs."""


def collective_minutes(guard: GuardConfig) -> float:
    """Return the timeout of the libraries' own collectives: longer than the watchdog's, which
    reports first, and the first process may work alone for a day."""
    return max(24 * 60.0, 4 * guard.hang_timeout_seconds / 60)


class HangWatch:
    """The watching thread. `end` ends a process that hangs: by os._exit, because an orderly exit
    might hang too."""

    def __init__(
        self, writer: Writer, timeout: float, errors: Path, *,
        record: Callable[[HangError], None] = lambda error: None,
        end: Callable[[int], None] = os._exit,
    ) -> None:  # fmt: skip
        """Prepare the watch; `timeout` is in seconds, reports go to the folder `errors`, and
        `record` is called with the error."""
        self.writer = writer
        self.timeout = timeout
        self.errors = errors
        self.record = record
        self.end = end
        self.progress: ProgressState = writer.progress
        self.interval = min(5.0, timeout / 4)
        # between two looks at the others' files; network file systems may show old ones for a
        # minute
        self.pause = max(2 * writer.interval + 0.5, min(75.0, timeout / 10))
        self._stop = threading.Event()
        self._first_beats = -1
        self._first_moved = time.monotonic()
        self._first_read = 0.0
        self._deadline: tuple[float, int] | None = None
        self._awake = 0.0
        self._thread = threading.Thread(target=self._run, name="hang-watch", daemon=True)

    def start(self) -> None:
        """Start the watching thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._stop.set()

    def expect_end(self, code: int, seconds: float) -> None:
        """Note that the process is leaving with `code` after a fault: end it if it has not ended in
        `seconds`."""
        self._deadline = (time.monotonic() + seconds, code)

    def limit(self) -> float:
        """Return the seconds that the main thread may be without progress in its current phase."""
        if self.progress.phase in OPEN_PHASES:
            return float("inf")
        trains = self.progress.train_iters > 0
        return self.timeout * (
            2.0
            if self.progress.phase in LONG_PHASES or (trains and not self.progress.warm)
            else 1.0
        )

    def what_hangs(self) -> str | None:
        """Return the message that says what hangs, or None."""
        silent = time.monotonic() - max(self.progress.moved, self._awake)
        limit = self.limit()
        if silent > limit:
            return (
                f"it has made no progress for {silent:.0f} s (the limit there is {limit:.0f} s, "
                f"guard.hang_timeout_seconds={self.timeout:g})"
            )
        if self.progress.phase == "waiting" and self._first_is_silent():
            return (
                f"rank 0, for which it waits, has not been heard of for {self.timeout:.0f} s "
                "(guard.hang_timeout_seconds)"
            )
        return None

    def _first_is_silent(self) -> bool:
        now = time.monotonic()
        if now - self._first_read >= min(30.0, self.interval):
            if now - self._first_read > self.timeout:
                self._first_moved = now  # not checked for so long, so nothing is known
            self._first_read = now
            beat = heartbeat.read_beat(
                heartbeat.file_of(self.writer.folder, 0), self.writer.attempt_id
            )
            if beat is not None and (beat.beats != self._first_beats or beat.state != "running"):
                self._first_beats = beat.beats
                self._first_moved = now
        return now - self._first_moved > self.timeout

    def _run(self) -> None:
        looked = time.monotonic()
        while not self._stop.wait(self.interval):
            now = time.monotonic()
            if now - looked > 4 * self.interval:
                # the whole process was stopped, e.g. by a scheduler that suspends jobs: nothing
                # hangs for that
                self._awake = now
            looked = now
            if self._deadline is not None:
                if time.monotonic() > self._deadline[0]:
                    print(
                        "error: this process did not end by itself after its fault",
                        file=sys.stderr,
                        flush=True,
                    )
                    self.end(self._deadline[1])
                continue
            what = self.what_hangs()
            if what is not None:
                report = threading.Thread(
                    target=self._report, args=(what,), name="hang-report", daemon=True
                )
                report.start()
                report.join(self.pause + _PATIENCE_SECONDS)
                self.end(HangError.exit_code)
                return

    def _report(self, what: str) -> None:
        writer = self.writer
        progress = self.progress
        where = heartbeat.position(
            progress.stage, progress.phase, progress.iteration, progress.train_iters
        )
        stacks = self.errors / f"hang_rank_{writer.rank:05d}.txt"

        def read() -> dict[int, Beat]:
            return heartbeat.read_all(writer.folder, writer.attempt_id, writer.world_size)

        beats, silent = heartbeat.find_silent_ranks(read, lambda: time.sleep(self.pause))
        lines = [
            f"rank {writer.rank} on {host_name()} hangs in {where}: {what}",
            *suspects(beats, silent, writer.world_size),
            f"stacks of all threads of this rank: {stacks}; every rank that can writes its own "
            "beside it",
            "the run ends here with code 8; the newest committed checkpoint is good: "
            "start the same command again to continue",
        ]
        error = HangError("\n  ".join(lines))
        print(f"error: {error}", file=sys.stderr, flush=True)
        stacks.parent.mkdir(parents=True, exist_ok=True)
        with stacks.open("w", encoding="utf-8") as stream:
            stream.write("\n".join(lines) + "\n\n")
            stream.flush()
            faulthandler.dump_traceback(file=stream, all_threads=True)
        self.record(error)
        writer.stop("hung")


def suspects(beats: dict[int, Beat], silent: Iterable[int], world_size: int) -> list[str]:
    """Return lines that name the ranks that the others wait for: ended, never started, or
    behind."""
    gone = [beats[rank] for rank in sorted(silent)]
    lines = _listed(
        gone,
        "does not answer: its process is stopped or dead, or its node is (last heartbeat: {where})",
    )
    missing = [rank for rank in range(world_size) if rank not in beats]
    if missing:
        more = f" and {len(missing) - _LONGEST_LIST} more" if len(missing) > _LONGEST_LIST else ""
        lines.append(
            f"no sign of rank {', '.join(map(str, missing[:_LONGEST_LIST]))}{more} in this start "
            "of the run"
        )
    others = [beat for rank, beat in sorted(beats.items()) if rank not in set(silent)]
    failed = [beat for beat in others if beat.state == "failed"]
    alive = [beat for beat in others if beat.state != "failed"]
    lines += _listed(failed, "has failed in {where}; see rank_{rank:05d}.json beside this")
    ahead = max((beat.place for beat in alive), default=None)
    behind = [beat for beat in alive if beat.place != ahead]
    lowest = min((beat.place for beat in behind), default=None)
    lines += _listed(
        [beat for beat in behind if beat.place == lowest],
        "is behind the others: in {where}, without progress for {silent_seconds:.0f} s",
    )
    if not lines:
        lines.append(
            "no rank is behind the others: they wait for each other, or all for the same thing; "
            "compare their stacks"
        )
    return lines


def _listed(beats: list[Beat], what: str) -> list[str]:
    """Return one line per rank; the number of further ranks."""
    lines = [
        f"{beat.who()} "
        f"{what.format(where=beat.where(), rank=beat.rank, silent_seconds=beat.silent_seconds)}"
        for beat in beats[:_LONGEST_LIST]
    ]
    return (
        [*lines, f"and {len(beats) - _LONGEST_LIST} more ranks like these"]
        if len(beats) > _LONGEST_LIST
        else lines
    )
