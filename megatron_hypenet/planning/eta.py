"""Estimate the work of each task of a run, and from it the remaining time.

Work is counted as in model/flops.py. Only ratios matter, because the machine's speed is measured
while the run goes on; tasks that move files instead of computing get a fixed share.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import STAGES, RunConfig, StageConfig
from megatron_hypenet.model.flops import forward_flops
from megatron_hypenet.stages.spec import stage_spec

FIXED_SHARE = {"data": 0.03, "probe": 0.005}
OTHER_SHARE = 0.01
"""Share of the total work that a task counts as which moves files instead of computing."""
EVALUATED_MODELS = 4
"""Models in the report: teacher, all layers converted, after distillation, after finetuning."""


def planned_work(run: RunConfig, teacher: ModelConfig, steps: Sequence[str]) -> dict[str, float]:
    """Work of each of `steps` (names) in this order, in floating-point operations."""
    student = teacher.converted(run.align.spec)  # which layers will keep attention is not known yet
    sweep = run.select
    longest = max(run.eval.length_multiples) * run.eval.seq_length
    recall = sum(run.eval.length_multiples) * run.eval.recall_sequences * run.eval.seq_length
    heldout = run.eval.heldout_sequences * run.eval.seq_length
    scored = (sweep.recall_sequences + sweep.heldout_sequences) * sweep.seq_length
    work = {
        name: _tokens(run.stage(name))
        * stage_spec(name).flops(teacher, student, run.stage(name).seq_length)
        for name in STAGES
    }
    work["select"] = (teacher.num_layers + 1) * scored * forward_flops(teacher, sweep.seq_length)
    work["report"] = EVALUATED_MODELS * (recall + heldout) * forward_flops(teacher, longest)
    total = float(sum(work[name] for name in steps if name in work))
    return {
        name: float(work[name]) if name in work else FIXED_SHARE.get(name, OTHER_SHARE) * total
        for name in steps
    }


class Clock:
    """Remaining time of a run from planned work and measured time. Work of an earlier start counts
    neither as work nor as time."""

    def __init__(
        self, work: Mapping[str, float], now: Callable[[], float] = time.monotonic
    ) -> None:
        self.now = now
        self.remaining = dict(work)
        self.done_work = 0.0
        self.start = now()
        self._before: dict[str, float] = {}
        """Share of a step that was done when its first part was reported here."""
        self._fraction: dict[str, float] = {}
        self._earlier = 0.0
        """The part of `done_work` that an earlier start did."""

    def skip(self, step: str) -> None:
        """Record that `step` needs no work."""
        self.remaining.pop(step, None)

    def progress(self, step: str, count: int, total: int) -> None:
        """Record that `count` of `total` equal parts of `step` are done, the last of them just
        now."""
        self._before.setdefault(step, max(count - 1, 0) / total)
        self._fraction[step] = count / total

    def finish(self, step: str) -> None:
        """Record that `step` is done."""
        work = self.remaining.pop(step, 0.0)
        self.done_work += work
        self._earlier += work * self._before.pop(step, 0.0)
        self._fraction.pop(step, None)

    def fraction(self) -> float:
        """Share of the run's work that is done, between 0 and 1."""
        total = self.done_work + sum(self.remaining.values())
        return self._done() / total if total else 1.0

    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.now() - self.start

    def eta(self) -> float | None:
        """Seconds to the end at the speed since the start; None before there is any."""
        done = self._done()
        here = (
            done
            - self._earlier
            - sum(self.remaining.get(step, 0.0) * part for step, part in self._before.items())
        )
        left = self.done_work + sum(self.remaining.values()) - done
        return self.elapsed() * left / here if here > 0 else None

    def _done(self) -> float:
        return self.done_work + sum(
            self.remaining.get(step, 0.0) * part for step, part in self._fraction.items()
        )


def _tokens(stage: StageConfig) -> int:
    return stage.train_iters * stage.tokens_per_step
