"""Hooks that the training loop calls after each step, evaluation and save: heartbeat and the time
that a stop takes, reports, and the caller's function. All processes call the same hooks in the same
order; some of them are collective."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from megatron_hypenet.config.schema import StageConfig
from megatron_hypenet.parallel import groups
from megatron_hypenet.supervision.heartbeat import PROGRESS
from megatron_hypenet.training.grace_period import Timing
from megatron_hypenet.training.metrics import MetricSums, Recorder, StepRecord, memory_gib
from megatron_hypenet.training.stragglers import StepTimes, named


@dataclass(slots=True)
class StepEnd:
    """A finished optimizer step."""

    record: StepRecord
    """Its loss, norm and speed; where the step is logged, hooks after RecordingHook also see the
    stage's metrics here."""
    metrics: Mapping[str, Tensor]
    """The stage's metrics of this process, on the device."""
    seconds: float
    tokens_seen: int
    """Tokens of all steps so far, the skipped ones included."""
    skipped_steps: int
    """Number of steps so far that were skipped."""

    @property
    def step(self) -> int:
        """Return the number of the step, from 1."""
        return self.record.step

    @property
    def last(self) -> bool:
        """Return whether this is the last step of the stage."""
        return self.record.step == self.record.train_iters


class Hook:
    """Base class whose methods do nothing; subclasses override some."""

    def on_step_end(self, end: StepEnd) -> None:
        """Do what is due after a step, before evaluation and save."""

    def on_eval(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Do what is due after an evaluation at `step`, which gave `values`."""

    def on_save(self, committed: Path, seconds: float) -> None:
        """Do what is due after a save was committed, `seconds` after its request."""


class ProgressHook(Hook):
    """Updates the heartbeat, and measures how early a run must be asked to stop."""

    def __init__(self, timing: Timing, folder: Path) -> None:
        """Write timing.json to the run folder `folder`."""
        self.timing = timing
        self.folder = folder

    def on_step_end(self, end: StepEnd) -> None:
        """Record a step; the first one also compiles and connects, so its time does not count."""
        if PROGRESS.warm:
            self.timing.step(end.seconds)
        record = end.record
        PROGRESS.finish_step(
            record.step,
            loss=None if record.skipped else record.loss,
            tokens_per_second=round(record.tokens_per_second, 1),
            eta_seconds=None if record.eta_seconds is None else round(record.eta_seconds, 1),
            skipped_steps=end.skipped_steps,
        )

    def on_eval(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Measure the evaluation."""
        self.timing.evaluation(seconds)

    def on_save(self, committed: Path, seconds: float) -> None:
        """Record the save, and write how long a stop takes."""
        self.timing.save(seconds)
        figures = self.timing.figures()
        del figures["margin_seconds"]
        PROGRESS.facts = {
            **PROGRESS.facts,
            "last_save": str(committed),
            "last_save_time": round(time.time(), 1),
            **figures,
        }
        if groups.rank() == 0:
            self.timing.write(self.folder)


class RecordingHook(Hook):
    """Averages the stage's metrics and reports every log interval."""

    def __init__(self, recorder: Recorder, step_times: StepTimes, config: StageConfig) -> None:
        self.recorder = recorder
        self.step_times = step_times
        self.config = config
        self._sums = MetricSums()

    def on_step_end(self, end: StepEnd) -> None:
        """Report at the end of a log interval, which is collective."""
        if not end.record.skipped:
            self._sums.add(end.metrics)
        if end.step % self.config.log_interval and not end.last:
            return
        values = self._sums.take(groups.all_reduce_mean)
        values = {
            tag: value
            for part in groups.gather_over_pipeline(values)
            for tag, value in part.items()
        }
        end.record = replace(end.record, metrics=values)
        times, slow = self.step_times.compare(self.recorder.interval_steps(end.step))
        memory = max(groups.gather_numbers(memory_gib()))
        self.recorder.interval(
            end.record, {**values, **times}, end.tokens_seen, memory=memory, slow=named(slow)
        )

    def on_eval(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Report the values."""
        self.recorder.evaluation(step, values, seconds)


class CallbackHook(Hook):
    """Calls functions of the caller with every step and every pause of training."""

    def __init__(
        self,
        on_step: Callable[[StepRecord], None] | None = None,
        on_pause: Callable[[str, float], None] | None = None,
        *,
        background: bool = False,
    ) -> None:
        """`background` says that saves are written while training goes on, which is no pause."""
        self.on_step = on_step
        self.on_pause = on_pause
        self.background = background

    def on_step_end(self, end: StepEnd) -> None:
        """Call the function for steps."""
        if self.on_step is not None:
            self.on_step(end.record)

    def on_eval(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Call the function for pauses."""
        if self.on_pause is not None:
            self.on_pause("evaluate", seconds)

    def on_save(self, committed: Path, seconds: float) -> None:
        """Call the function for pauses."""
        if self.on_pause is not None and not self.background:
            self.on_pause("save", seconds)
