"""Report a training run: every loss to losses.jsonl, TensorBoard points and one line per log
interval.

TensorBoard tags and units are in the table below; a stage adds its own (align/layer_00 ...,
distill/kl, finetune/lm_loss).
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from megatron_hypenet.atomic_files import write_text
from megatron_hypenet.errors import DataError
from megatron_hypenet.training.short_text import short_count, short_time
from megatron_hypenet.training.throughput import Workload
from megatron_hypenet.untrusted.files import FileKind, has_entry
from megatron_hypenet.untrusted.json_text import parse_json, typed

logger = logging.getLogger(__name__)

_KIND = FileKind(
    error=DataError,
    advice="restore the file, or delete the damaged lines: the run goes on without them",
    max_bytes=1 << 30,
)

TAGS = {
    "loss": "mean stage loss since the last point (align: mean squared error; "
    "distill and finetune: nats per token)",
    "learning-rate": "of the last step",
    "grad-norm": "global gradient norm of the last step, before clipping",
    "tokens-per-second": "tokens of all processes per second, since the last point",
    "tokens-per-second-per-gpu": "the same per process, each of which has one GPU (or is one on a "
    "CPU)",
    "tflops-per-gpu": "useful floating-point operations per second and process, "
    "in units of 1e12 (model/flops.py)",
    "mfu": "those over the GPU's dense bf16 peak, between 0 and 1; only for GPUs whose peak is "
    "known",
    "step-time-ms": "milliseconds per step, since the last point",
    "step-time/min-ms": "of the time each rank spends in its own forward passes per step: "
    "the fastest rank's (training/stragglers.py)",
    "step-time/median-ms": "the median of the ranks; those above 1.3 times their peers' in three "
    "intervals are named in slow-ranks",
    "step-time/max-ms": "the slowest rank's",
    "tokens-seen": "tokens consumed since the stage began",
    "skipped-steps": "steps of this stage so far that were left out because their loss or gradient "
    "was not finite",
    "memory-gib": "peak GPU memory of the stage, or resident memory on a CPU, "
    "of the rank where it is largest",
}
"""Tag -> meaning and unit; eval/* comes from the evaluation callback."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One finished optimizer step, as callbacks get it; the same on every process."""

    stage: str
    step: int
    train_iters: int
    loss: float
    grad_norm: float
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
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The stage's metrics, averaged over the log interval; only on steps that are logged."""

    def line(self) -> str:
        """Return the log line of this step."""
        return (
            f"iter {self.step}/{self.train_iters} | loss {self.loss:.4g} | gnorm "
            f"{self.grad_norm:.3g} | lr {self.lr:.2e} | "
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
        return (
            each
            if share is None
            else f"{each} | {work.tflops_per_device(self.tokens_per_second):.0f} TFLOP/s/gpu | mfu "
            f"{share:.1%}"
        )


class LossLog:
    """The file losses.jsonl: one line per step with exact values (JSON keeps every bit of a float).
    When a run continues, later lines are removed."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        records = loss_lines(path)
        kept = [line for line, record in records if record.step <= resumed_step]
        reached = max((record.step for _, record in records), default=0)
        if reached < resumed_step:
            logger.warning(
                "%s ends at step %d, the run continues after step %d: the losses between are lost",
                path,
                reached,
                resumed_step,
            )
        write_text(path, "".join(line + "\n" for line in kept))
        self._stream: IO[str] = path.open("a", buffering=1)

    def append(self, step: int, loss: float | None, grad_norm: float | None, lr: float) -> None:
        """Add one step; a skipped one has no loss and no norm."""
        self._stream.write(
            json.dumps({"step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr}) + "\n"
        )

    def close(self) -> None:
        """Flush and close."""
        self._stream.close()


@dataclass(frozen=True, kw_only=True)
class LossLine:
    """One line of losses.jsonl; entries of a later version are ignored."""

    step: Annotated[int, Field(ge=1)]
    loss: float | None
    grad_norm: float | None
    lr: float


def loss_lines(path: Path) -> list[tuple[str, LossLine]]:
    """Return the lines of a losses.jsonl and their parsed content, with ascending steps. An
    incomplete last line, as a killed process leaves it, is dropped. DataError names the first line
    that is damaged otherwise."""
    if not has_entry(path):
        return []
    *lines, _torn = _KIND.read_bytes(path).split(b"\n")
    found: list[tuple[str, LossLine]] = []
    for number, content in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        line = _KIND.decode(where, content)
        record = typed(_KIND, where, parse_json(_KIND, where, line), LossLine)
        if found and record.step <= found[-1][1].step:
            _KIND.refuse(where, f"step {record.step} follows step {found[-1][1].step}")
        found.append((line, record))
    return found


class Recorder:
    """Writes the reports on rank 0. On other ranks it only measures time, so that all ranks make
    records."""

    def __init__(
        self, *, stage: str, train_iters: int, step: int, first: bool, out_dir: Path,
        tensorboard_dir: Path,
        log: Callable[[str], None] | None = None, workload: Workload | None = None,
        skipped_steps: int = 0,
    ) -> None:  # fmt: skip
        self.workload = workload
        self.skipped_steps = skipped_steps
        self.stage = stage
        self.train_iters = train_iters
        self.first = first
        self._log = log or _print_line
        self._losses = LossLog(out_dir / "losses.jsonl", step) if first else None
        self._board: Any = None
        if first:
            from torch.utils.tensorboard import SummaryWriter

            # from step 0 too: a start that ended before its first save may have written points
            self._board = SummaryWriter(str(tensorboard_dir), purge_step=step + 1)
        self._first: tuple[int, float] | None = None
        """The first step of this start, and when it was done."""
        self._restart(step)

    def _restart(self, step: int) -> None:
        self._since = time.perf_counter()
        self._from_step = step
        self._tokens = 0
        self._loss_sum = 0.0
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
        )

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
        if self._board is not None:
            points = {
                "loss": self._loss_sum / self._num_losses if self._num_losses else math.nan,
                "learning-rate": record.lr,
                "grad-norm": record.grad_norm,
                "tokens-per-second": record.tokens_per_second,
                "step-time-ms": 1000 * (time.perf_counter() - self._since) / steps,
                "tokens-seen": tokens_seen,
                "skipped-steps": self.skipped_steps,
                "memory-gib": memory,
            }
            self.points(record.step, {**points, **self._use(record.tokens_per_second), **metrics})
            if slow:
                self._board.add_text("step-time/slow-ranks", slow, record.step)
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
        return points if share is None else {**points, "mfu": share}

    def interval_steps(self, step: int) -> int:
        """Return the number of steps of the current interval, up to and including `step`."""
        return max(step - self._from_step, 1)

    def exclude(self, seconds: float) -> None:
        """Exclude `seconds` (a save, an evaluation) from the speed of the current interval."""
        self._since += seconds

    def points(self, step: int, values: Mapping[str, float]) -> None:
        """Write TensorBoard points at `step`."""
        if self._board is not None:
            for tag, value in values.items():
                self._board.add_scalar(tag, value, step)

    def flush(self) -> None:
        """Write buffered points to the disk. This comes before a save, because a start that
        continues from the save does not write earlier points again."""
        if self._board is not None:
            self._board.flush()

    def note(self, text: str) -> None:
        """Log one line that is not a step: resumed, saved."""
        if self.first:
            self._log(text)

    def close(self) -> None:
        """Flush and close the files."""
        if self._losses is not None:
            self._losses.close()
        if self._board is not None:
            self._board.close()


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

    def means(self) -> dict[str, Tensor]:
        """Return the means of what was added."""
        return {tag: value / self.count for tag, value in self._sums.items()}

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
