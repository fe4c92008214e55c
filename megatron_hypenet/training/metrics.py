"""Report a training run: every loss to losses.jsonl, points to metrics.jsonl and the trackers, and
a line per log interval and evaluation.

The tags of the points are in tags.py.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_hypenet.training.short_text import short_count, short_time
from megatron_hypenet.training.step_files import LOSSES, METRICS, LossLog, MetricsLog
from megatron_hypenet.training.tags import EVAL, SPEED, TEACHER, TRAIN, tag_of
from megatron_hypenet.training.throughput import Workload
from megatron_hypenet.training.trackers.base import Tracker


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One finished optimizer step, as callbacks get it; the same on every process."""

    stage: str
    step: int
    train_iters: int
    loss: float
    """The value of this step alone."""
    grad_norm: float
    """The value of this step alone."""
    lr: float
    tokens_per_second: float
    """Tokens per second, averaged over the current log interval."""
    eta_seconds: float | None
    """Seconds to the last step at the mean speed of this start, evaluations and saves included;
    None after its first step, which also compiles."""
    workload: Workload | None = None
    skipped: bool = False
    """True when the loss or the gradient was not finite and nothing was updated; loss and grad_norm
    are then NaN."""
    mean_loss: float | None = None
    """Mean of the losses since the last logged step; None where the loss itself is meant."""
    mean_grad_norm: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The stage's metrics, averaged over the log interval; only on steps that are logged."""

    def line(self) -> str:
        """Return the log line of the interval that ends with this step: loss, gradient norm and
        speed are means over it."""
        loss = self.loss if self.mean_loss is None else self.mean_loss
        norm = self.grad_norm if self.mean_grad_norm is None else self.mean_grad_norm
        return (
            f"iter {self.step}/{self.train_iters} | loss {loss:.4g} | gnorm "
            f"{norm:.3g} | lr {self.lr:.2e} | "
            f"{short_count(self.tokens_per_second)} tok/s{self._use()}"
            + ("" if self.eta_seconds is None else f" | eta {short_time(self.eta_seconds)}")
        )

    def _use(self) -> str:
        """Return text with speed and utilisation per GPU; empty where these are unknown."""
        work = self.workload
        if work is None:
            return ""
        share = work.mfu(self.tokens_per_second)
        each = (
            f" | {short_count(self.tokens_per_second / work.num_devices)} tok/s/gpu"
            if work.num_devices > 1
            else ""
        )
        if share is None:
            return each
        of_fp8 = (
            f" ({work.utilisation(self.tokens_per_second):.1%} of fp8's)"
            if work.fp8_flops_per_token
            else ""
        )
        return (
            f"{each} | {work.tflops_per_device(self.tokens_per_second):.0f} TFLOP/s/gpu | mfu "
            f"{share:.1%}{of_fp8}"
        )


class Recorder:
    """Writes the reports on the first process. On others it only measures time, so that all make
    records."""

    def __init__(
        self, *, stage: str, loss: str, train_iters: int, step: int, first: bool, out_dir: Path,
        trackers: Sequence[Tracker] = (),
        log: Callable[[str], None] | None = None, workload: Workload | None = None,
        skipped_steps: int = 0,
    ) -> None:  # fmt: skip
        """Open the logs; `loss` names the quantity that the stage minimises (`StageSpec.loss`); the
        recorder closes the `trackers`, which only the first process has."""
        self.workload = workload
        self.loss_tag = TRAIN + loss
        self.skipped_steps = skipped_steps
        self.stage = stage
        self.train_iters = train_iters
        self.first = first
        self._log = log or _print_line
        self._losses = LossLog(out_dir / LOSSES, step) if first else None
        self._metrics = MetricsLog(out_dir / METRICS, step) if first else None
        self._trackers = tuple(trackers)
        self._first: tuple[int, float] | None = None
        """The first step of this start, and when it was done."""
        self._restart(step)

    def _restart(self, step: int) -> None:
        self._since = time.perf_counter()
        self._from_step = step
        self._tokens = 0
        self._loss_sum = 0.0
        self._norm_sum = 0.0
        self._num_losses = 0

    def step(
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        lr: float,
        tokens: int,
        skipped: bool = False,
    ) -> StepRecord:
        """Record one finished step of `tokens` tokens. Loss and norm of a `skipped` step are not
        used."""
        self._tokens += tokens
        if skipped:
            loss = grad_norm = math.nan
            self.skipped_steps += 1
        else:
            self._loss_sum += loss
            self._norm_sum += grad_norm
            self._num_losses += 1
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        if self._losses is not None:
            self._losses.append(step, None if skipped else loss, None if skipped else grad_norm, lr)
        eta = self._eta(step)
        return StepRecord(
            stage=self.stage,
            step=step,
            train_iters=self.train_iters,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            tokens_per_second=self._tokens / elapsed,
            eta_seconds=eta,
            workload=self.workload,
            skipped=skipped,
            mean_loss=self._mean(self._loss_sum),
            mean_grad_norm=self._mean(self._norm_sum),
        )

    def _mean(self, total: float) -> float:
        return total / self._num_losses if self._num_losses else math.nan

    def _eta(self, step: int) -> float | None:
        moment = time.perf_counter()
        if self._first is None:
            self._first = (step, moment)
        first, since = self._first
        left = self.train_iters - step
        if left == 0:
            return 0.0
        return (moment - since) / (step - first) * left if step > first else None

    def interval(
        self,
        record: StepRecord,
        metrics: Mapping[str, float],
        tokens_seen: int,
        *,
        memory: float,
        slow: str = "",
    ) -> None:
        """Log the interval that ends with `record`, and begin the next; `memory` is the fullest
        rank's `memory_gib`, `slow` names ranks that slow the others down."""
        steps = self.interval_steps(record.step)
        if self.first:
            trained = {
                "learning-rate": record.lr,
                "grad-norm": self._mean(self._norm_sum),
                "tokens-seen": tokens_seen,
                "skipped-steps": self.skipped_steps,
            }
            speed = {
                "tokens-per-second": record.tokens_per_second,
                **self._use(record.tokens_per_second),
                "step-time-ms": 1000 * (time.perf_counter() - self._since) / steps,
                "memory-gib": memory,
            }
            points = {
                **{TRAIN + name: value for name, value in trained.items()},
                **{SPEED + name: value for name, value in speed.items()},
                **metrics,
                self.loss_tag: self._mean(self._loss_sum),
            }
            self.points(record.step, points)
            if slow:
                for tracker in self._trackers:
                    tracker.text("speed/slow-ranks", slow, record.step)
            self._log(record.line() + (f" | slow: {slow}" if slow else ""))
        self._restart(record.step)

    def _use(self, tokens_per_second: float) -> dict[str, float]:
        if self.workload is None:
            return {}
        points = {
            "tokens-per-second-per-gpu": tokens_per_second / self.workload.num_devices,
            "tflops-per-gpu": self.workload.tflops_per_device(tokens_per_second),
        }
        share = self.workload.mfu(tokens_per_second)
        if share is None:
            return points
        points["mfu"] = share
        if self.workload.fp8_flops_per_token:
            points["utilisation"] = self.workload.utilisation(tokens_per_second) or 0.0
        return points

    def interval_steps(self, step: int) -> int:
        """Return the number of steps of the current interval, up to and including `step`."""
        return max(step - self._from_step, 1)

    def exclude(self, seconds: float) -> None:
        """Exclude `seconds` (a save, an evaluation) from the speed of the current interval."""
        self._since += seconds

    def evaluation(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Report an evaluation on held-out text, which took `seconds`."""
        if values:
            self.points(step, {**values, SPEED + "evaluation-seconds": seconds})
            self.note(evaluation_line(step, self.train_iters, values, seconds))

    def points(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of tags at `step` to metrics.jsonl and the trackers."""
        if self._metrics is not None:
            self._metrics.append(step, values)
        for tracker in self._trackers:
            tracker.scalars(step, values)

    def flush(self) -> None:
        """Write buffered points to the disk. This comes before a save, because a start that
        continues from the save does not write earlier points again."""
        for tracker in self._trackers:
            tracker.flush()

    def note(self, text: str) -> None:
        """Log one line that is not a step: resumed, saved."""
        if self.first:
            self._log(text)

    def close(self) -> None:
        """Flush and close the files."""
        for log in (self._losses, self._metrics):
            if log is not None:
                log.close()
        for tracker in self._trackers:
            tracker.close()


def evaluation_line(
    step: int, train_iters: int, values: Mapping[str, float], seconds: float
) -> str:
    """Return the log line of an evaluation: held-out quantities of the student, each with the
    teacher's where that is known."""
    parts = [f"held-out at iter {step}/{train_iters}"]
    for tag, value in values.items():
        name = tag.removeprefix(EVAL)
        if name.startswith(TEACHER):
            continue
        about = tag_of(tag)
        unit = " %" if about is not None and about.unit == "%" else ""
        digits = ".1f" if unit else ".4g"
        teacher = values.get(f"{EVAL}{TEACHER}{name}")
        beside = "" if teacher is None else f" (teacher {teacher:{digits}}{unit})"
        parts.append(f"{name} {value:{digits}}{unit}{beside}")
    return " | ".join([*parts, short_time(seconds)])


class MetricSums:
    """Running sums of scalars by tag, on the device."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add one step's or micro-batch's values, which may be overwritten afterwards."""
        self.count += 1
        for tag, value in metrics.items():
            known = self._sums.get(tag)
            self._sums[tag] = value.detach().clone() if known is None else known + value.detach()

    def means(self, count: int) -> dict[str, Tensor]:
        """Return the means over `count` steps or micro-batches of what was added in parts."""
        return {tag: value / count for tag, value in self._sums.items()}

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the means since the last call on the host, after `reduce` (mean over data-parallel
        ranks); clears the sums."""
        if not self._sums:
            return {}
        stacked = reduce(torch.stack([value.float() for value in self._sums.values()]) / self.count)
        values = dict(zip(self._sums, stacked.tolist(), strict=True))
        self._sums = {}
        self.count = 0
        return values


def reset_peak_memory() -> None:
    """Restart the measurement of peak GPU memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def memory_gib() -> float:
    """Return peak GPU memory since `reset_peak_memory`, or resident memory of the process without
    CUDA, in GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import psutil

    return psutil.Process().memory_info().rss / 2**30


def _print_line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
