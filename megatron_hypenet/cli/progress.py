"""The output of a run while it works: one line per event, and on a terminal a bar with the time
left for the whole run."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

SAVE = "save"
"""The kind of pause after which measurements are kept; planning/eta.py has all kinds."""

if TYPE_CHECKING:
    from megatron_hypenet.data.prepare import Progress
    from megatron_hypenet.planning.eta import Clock
    from megatron_hypenet.training.metrics import StepRecord

LOG_SECONDS = 60.0
"""Time between two lines about a preparation where the output is no terminal."""


class Screen:
    """Lines on stderr and in logs/hypenet.log, with a bar below them on a terminal; silent on all
    processes but the first."""

    def __init__(
        self, clock: Clock, log_file: Path, *, is_main: bool = True, stream: TextIO | None = None
    ) -> None:
        stream = sys.stderr if stream is None else stream
        self.clock = clock
        self.is_main = is_main
        self.stream = stream
        self.keep: Callable[[], None] = lambda: None
        """Called when speeds were measured which the next start of the run should know."""
        self.whole = True
        """Whether this command does the whole run; it counts the time of its own steps only."""
        self.does: dict[str, str] = {}
        """Step -> what it does in a few words, in order."""
        self._log: TextIO | None = None
        self._bar: Any = None
        if is_main:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            self._log = log_file.open("a", encoding="utf-8", buffering=1)
            # a terminal that moves no cursor (TERM=dumb) gets lines only
            if stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown"):
                self._bar = _bar(stream)
                self._task = self._bar.add_task("", total=1.0)
                self._bar.start()

    def say(self, text: str) -> None:
        """Print one line, with a time stamp in the log file."""
        if not self.is_main:
            return
        if self._bar is not None:
            # the terminal breaks long lines: one that is copied or searched stays whole
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)
        if self._log is not None:
            self._log.write(f"{datetime.now().isoformat(timespec='seconds')} {text}\n")

    def announce(self, step: str, what: str) -> None:
        """Say that a step "starts", is "skipped" or is "done in ..."."""
        if what == "skipped":
            self.clock.skip(step)
            self.say(f"[{self._place(step)}] {step}: done before, skipped")
        elif what == "starts":
            self.clock.begin(step)
            self.say(f"[{self._place(step)}] {step}: {self.does[step]}")
        else:
            self.clock.finish(step)
            left = self._left()
            share = f" | run {100 * self.clock.fraction():.0f} % done, {left}" if left else ""
            self.say(f"[{self._place(step)}] {step}: {what}{share}")
            self.keep()
        self._update(step)

    def count_only(self, steps: set[str]) -> None:
        """Note that this command does no other steps than these."""
        self.clock.only(steps)
        self.whole = False

    def on_step(self, record: StepRecord) -> None:
        """Note that an optimizer step of a training stage is done."""
        self.part(record.stage, record.step, record.train_iters)

    def part(self, step: str, count: int, total: int) -> None:
        """Note that `count` of `total` parts of a step are done."""
        self.clock.progress(step, count, max(total, 1))
        self._update(step)

    def pause(self, kind: str, seconds: float) -> None:
        """Note that an evaluation or a save inside a training stage took `seconds`."""
        self.clock.pause(kind, seconds)
        if kind == SAVE:
            self.keep()

    def train_line(self, text: str) -> None:
        """Print a line of the training loop."""
        left = self._left() if text.startswith("iter ") else ""
        what = "run" if self.whole else "command"
        self.say(f"  {text} | whole {what}: {left}" if left else f"  {text}")

    def close(self) -> None:
        """Remove the bar and close the log."""
        self.clock.end()
        self.keep()
        self.keep = lambda: None
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def _place(self, step: str) -> str:
        return f"{list(self.does).index(step) + 1}/{len(self.does)}"

    def _left(self) -> str:
        from megatron_hypenet.training.short_text import short_time

        eta = self.clock.eta()
        return "" if eta is None else f"{short_time(eta)} left"

    def _update(self, step: str) -> None:
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=self.clock.fraction(),
                description=", ".join(filter(None, (f"{self._place(step)} {step}", self._left()))),
            )


def _bar(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(file=stream), transient=True)


@contextmanager
def corpus_progress(stream: TextIO | None = None) -> Iterator[Callable[[Progress], None]]:
    """Yield a function that shows how far a preparation is: one line that is written over on a
    terminal, else a line a minute."""
    out = sys.stderr if stream is None else stream
    terminal = out.isatty()
    pause = 0.5 if terminal else LOG_SECONDS
    shown = -math.inf

    def show(progress: Progress) -> None:
        nonlocal shown
        if progress.seconds - shown < pause:
            return
        if shown == -math.inf and not terminal:
            shown = progress.seconds  # a short text needs no line
            return
        shown = progress.seconds
        text = corpus_line(progress)
        print(f"\r{text:<100}" if terminal else text, end="" if terminal else "\n", file=out)
        out.flush()

    yield show
    if terminal and shown != -math.inf:
        print(file=out)


def corpus_line(progress: Progress) -> str:
    """Say in one line how far a preparation is."""
    done = progress.read_bytes - progress.bytes_before
    rate = done / max(progress.seconds, 1e-6)
    left = (progress.total_bytes - progress.read_bytes) / rate if rate else math.inf
    return (
        f"{progress.read_bytes / 1e9:.2f} of {progress.total_bytes / 1e9:.2f} GB, "
        f"{progress.documents:,} documents, {progress.tokens:,} tokens, {rate / 1e6:.1f} MB/s, "
        + (f"{duration(left)} left" if math.isfinite(left) else "starting")
    )


def duration(seconds: float) -> str:
    """Return a time in hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
