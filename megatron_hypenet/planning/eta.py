"""Estimate the work of each step of a run, and from measured speeds the time that is left.

Work is counted in floating-point operations as in model/flops.py. A step that runs is
extrapolated from its own speed. A step that has not begun takes its work over the speed of the
steps that were measured, in this start or an earlier one (<run folder>/rates.json), scaled by how
well its kind uses the machine; steps that move files take as long as the import of the teacher did.
There is no estimate before a step that computes has been measured.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hypenet.atomic_files import write_json
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import GATES, STAGES, RunConfig
from megatron_hypenet.errors import DataError
from megatron_hypenet.model.flops import forward_flops
from megatron_hypenet.planning.layout_search import teacher_and_student
from megatron_hypenet.stages.selection.method import selection_method
from megatron_hypenet.stages.spec import stage_spec
from megatron_hypenet.untrusted.files import FileKind
from megatron_hypenet.untrusted.json_text import read_typed

FILE = "rates.json"
_KIND = FileKind(error=DataError, advice="it is measured again", max_bytes=1 << 20)

EVALUATED_MODELS = 4
"""Models in the report: teacher, all layers converted, after distillation, after finetuning."""

FORWARD_USE = 0.4
"""Share of the peak that forward passes alone are taken to reach, as `StageSpec.mfu`."""

EVALUATION = "evaluate"
SAVE = "save"

_MARKS = 400
"""Progress reports that are remembered of a step."""
_SETTLED_MARKS = 3
_SETTLED_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """The work of a step."""

    flops: float = 0.0
    """Operations without those of evaluations; 0 for steps that move files."""
    evaluations: int = 0
    """Held-out evaluations inside a training stage."""
    evaluation_flops: float = 0.0
    """Operations of each of them."""
    saves: int = 0
    parts: tuple[float, ...] = ()
    """Work of the parts that it reports, where they differ."""


def planned_work(run: RunConfig, teacher: ModelConfig, steps: Sequence[str]) -> dict[str, Planned]:
    """Return the work of each of `steps` (names) in this order, in floating-point operations."""
    # which layers will keep attention is not known yet; that a quarter does decides the work
    _, student = teacher_and_student(teacher, run.align.spec)
    settings = run.eval
    select = selection_method(run.select.method).flops(
        run.select, teacher, teacher.converted(run.align.spec)
    )
    lengths = [settings.seq_length, *(m * settings.seq_length for m in settings.length_multiples)]
    counts = [settings.heldout_sequences] + [settings.recall_sequences] * (len(lengths) - 1)
    row = [
        count * length * forward_flops(teacher, length)
        for count, length in zip(counts, lengths, strict=True)
    ]
    # the text of the first part once more at every length, in fewer sequences
    for part, multiple in enumerate(settings.length_multiples, start=1):
        again = max(1, settings.heldout_sequences // multiple) if multiple != 1 else 0
        row[part] += again * lengths[part] * forward_flops(teacher, lengths[part])
    report = EVALUATED_MODELS * sum(row)
    planned = {
        "select": Planned(flops=select),
        "report": Planned(flops=report, parts=tuple(EVALUATED_MODELS * row)),
    }
    for name in STAGES:
        stage = run.stage(name)
        spec = stage_spec(name)
        trained = spec.student_shape(teacher, student, run.align.spec)
        per_token = spec.flops(stage, teacher, trained)
        evaluated = settings.quick_sequences * min(stage.seq_length, settings.seq_length)
        quick = _quick_flops(run, student) if stage_spec(name).through_head else 0.0
        planned[name] = Planned(
            flops=stage.train_iters * stage.tokens_per_step * per_token,
            # the last step is always evaluated; backward is left out
            evaluations=-(-stage.train_iters // run.eval_every(stage)),
            evaluation_flops=evaluated * per_token / 3 + quick,
            saves=max(1, -(-stage.train_iters // stage.save_interval)),
        )
    for gate, before in GATES.items():
        planned[gate] = Planned(flops=_gate_flops(run, teacher, before))
    return {name: planned.get(name, Planned()) for name in steps}


def _gate_flops(run: RunConfig, teacher: ModelConfig, stage: str) -> float:
    """Return the operations of the check after a training stage."""
    settings, bounds = run.eval, run.eval.gate.after(stage)
    flops = 0.0
    if bounds.max_loss_ratio is not None:  # teacher and student
        tokens = 2 * settings.heldout_sequences * settings.seq_length
        flops += tokens * forward_flops(teacher, settings.seq_length)
    if bounds.min_recall is not None:
        length = bounds.recall_multiple * settings.seq_length
        flops += settings.recall_sequences * length * forward_flops(teacher, length)
    return flops


def _quick_flops(run: RunConfig, student: ModelConfig) -> float:
    """Count the work of one `Measure.quick`: held-out text, and recall documents at the shortest
    length."""
    settings = run.eval
    lengths = (settings.seq_length, min(settings.length_multiples) * settings.seq_length)
    return settings.quick_sequences * sum(
        length * forward_flops(student, length) for length in lengths
    )


def use_of(step: str) -> float:
    """Return the share of the peak that a step which computes reaches; only ratios matter to a
    clock."""
    return stage_spec(step).mfu if step in STAGES else FORWARD_USE


@dataclass(slots=True)
class _Current:
    """The step that runs."""

    name: str
    began: float
    marks: list[tuple[float, float, float]]
    """(time, share done, seconds of pauses until then)."""
    paused: float = 0.0


@dataclass(slots=True)
class Rate:
    """What was measured of a step."""

    flops_per_second: float = 0.0
    """0 for steps that move files."""
    seconds: float = 0.0
    """Seconds of all starts that worked on it."""
    before_seconds: float = 0.0
    """Seconds before its first progress: models are built and loaded, kernels compiled."""
    evaluate_seconds: float = 0.0
    save_seconds: float = 0.0


class Clock:
    """Remaining time of a run, from planned work and measured speeds."""

    def __init__(
        self,
        planned: Mapping[str, Planned],
        known: Mapping[str, Rate] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`known` are the measurements of earlier starts of this run."""
        self.now = now
        self.left = dict(planned)
        self.rates = dict(known or {})
        self.start = now()
        self._earlier = sum(rate.seconds for rate in self.rates.values())
        self._current: _Current | None = None
        self._pauses: dict[str, list[float]] = {EVALUATION: [], SAVE: []}

    def only(self, steps: Iterable[str]) -> None:
        """Count these steps only: a command that does a part of the run."""
        wanted = set(steps)
        self.left = {name: work for name, work in self.left.items() if name in wanted}

    def skip(self, step: str) -> None:
        """Record that `step` needs no work."""
        self.left.pop(step, None)

    def begin(self, step: str) -> None:
        """Record that `step` begins."""
        self._current = _Current(step, self.now(), [])
        self._pauses = {EVALUATION: [], SAVE: []}

    def progress(self, step: str, count: int, total: int) -> None:
        """Record that `count` of `total` parts of `step` are done, the last of them just now."""
        if self._current is None or self._current.name != step:
            self.begin(step)
        current = self._current
        assert current is not None, "it has just begun"
        planned = self.left.get(step)
        parts = planned.parts if planned else ()
        share = count / total if len(parts) != total else sum(parts[:count]) / sum(parts)
        current.marks.append((self.now(), share, current.paused))
        if len(current.marks) > _MARKS:
            del current.marks[1:-1:2]
        self._measure(current)

    def pause(self, kind: str, seconds: float) -> None:
        """Record that an evaluation or a save inside the current step took `seconds`."""
        self._pauses.setdefault(kind, []).append(seconds)
        if self._current is not None:
            self._current.paused += seconds

    def finish(self, step: str) -> None:
        """Record that `step` is done."""
        self.left.pop(step, None)
        current = self._current
        if current is not None and current.name == step:
            rate = self.rates.setdefault(step, Rate())
            rate.seconds += self.now() - current.began
            self._current = None

    def end(self) -> None:
        """Record that this start ends, perhaps within a step."""
        if self._current is not None:
            rate = self.rates.setdefault(self._current.name, Rate())
            rate.seconds += self.now() - self._current.began
            self._current = None

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return self.now() - self.start

    def fraction(self) -> float:
        """Return the share of the run's time that is over, earlier starts included; 0 before there
        is an estimate."""
        if not self.left:
            return 1.0
        eta = self.eta()
        over = self._earlier + self.elapsed()
        return 0.0 if eta is None or over + eta <= 0 else over / (over + eta)

    def eta(self) -> float | None:
        """Return the seconds to the end; None before a step that computes was measured."""
        if self._speed() is None and any(work.flops for work in self.left.values()):
            return None
        seconds = 0.0
        for name in self.left:
            current = self._current is not None and self._current.name == name
            seconds += self._rest() if current else self._whole(name)
        return seconds

    def _measure(self, current: _Current) -> None:
        """Take the speed of the current step from its reports."""
        planned = self.left.get(current.name)
        first = current.marks[0]
        rate = self.rates.setdefault(current.name, Rate())
        if len(current.marks) == 1 and planned is not None and planned.flops:
            rate.before_seconds = first[0] - current.began
        # the beginning is slower: kernels are compiled, caches filled; and machines are shared
        begin = current.marks[len(current.marks) // 2]
        last = current.marks[-1]
        busy = (last[0] - begin[0]) - (last[2] - begin[2])
        settled = len(current.marks) >= _SETTLED_MARKS and last[0] - first[0] >= _SETTLED_SECONDS
        if planned is not None and planned.flops and settled and busy > 0 and last[1] > begin[1]:
            rate.flops_per_second = planned.flops * (last[1] - begin[1]) / busy
        for kind, name in ((EVALUATION, "evaluate_seconds"), (SAVE, "save_seconds")):
            if taken := self._pauses[kind]:
                setattr(rate, name, sum(taken) / len(taken))

    def _speed(self) -> float | None:
        """Return the operations per second of work that uses the whole machine, by the step that
        was measured last."""
        for name in (*reversed(STAGES), "select", "report"):
            rate = self.rates.get(name)
            if rate is not None and rate.flops_per_second > 0:
                return rate.flops_per_second / use_of(name)
        return None

    def _flops_per_second(self, step: str) -> float | None:
        rate = self.rates.get(step)
        if rate is not None and rate.flops_per_second > 0:
            return rate.flops_per_second
        speed = self._speed()
        return None if speed is None else speed * use_of(step)

    def _whole(self, step: str) -> float:
        """Return the seconds that a step takes which has not begun in this start."""
        planned = self.left[step]
        if not planned.flops:
            moved = self.rates.get(step) or self.rates.get("teacher")
            return moved.seconds if moved is not None else 0.0
        return self._before(step) + self._computing(step, 1.0) + self._pauses_left(step, 1.0)

    def _rest(self) -> float:
        """Return the seconds that the current step still takes."""
        current = self._current
        assert current is not None
        planned = self.left[current.name]
        since = self.now() - (current.marks[-1][0] if current.marks else current.began)
        if not planned.flops and len(current.marks) > 1:  # files of which it says how far it is
            first = current.marks[0]
            last = current.marks[-1]
            if last[1] > first[1]:
                whole = (last[0] - first[0]) / (last[1] - first[1])
                return max(0.0, (1.0 - last[1]) * whole - since)
        if not planned.flops or not current.marks:
            return max(0.0, self._whole(current.name) - since)
        left = 1.0 - current.marks[-1][1]
        computing = self._computing(current.name, left)
        return max(0.0, computing - since) + self._pauses_left(current.name, left)

    def _computing(self, step: str, share: float) -> float:
        speed = self._flops_per_second(step)
        return 0.0 if not speed else share * self.left[step].flops / speed

    def _before(self, step: str) -> float:
        """Return the seconds before the first progress of a step: its own of an earlier start, or
        those of the steps that were measured."""
        own = self.rates.get(step)
        if own is not None and own.before_seconds > 0:
            return own.before_seconds
        taken = [rate.before_seconds for rate in self.rates.values() if rate.before_seconds > 0]
        return sum(taken) / len(taken) if taken else 0.0

    def _pauses_left(self, step: str, share: float) -> float:
        """Return the seconds of the evaluations and saves in the last `share` of a step."""
        planned = self.left[step]
        if not planned.evaluations:
            return 0.0
        rate = self.rates.get(step, Rate())
        speed = self._flops_per_second(step)
        evaluation = rate.evaluate_seconds or (planned.evaluation_flops / speed if speed else 0.0)
        save = rate.save_seconds or max(
            (other.save_seconds for other in self.rates.values()), default=0.0
        )
        return -(-share * planned.evaluations // 1) * evaluation + (
            -(-share * planned.saves // 1) * save
        )


def read_rates(folder: Path) -> dict[str, Rate]:
    """Return the measurements of earlier starts in a run folder; none where they cannot be read."""
    try:
        return read_typed(_KIND, folder / FILE, dict[str, Rate])
    except DataError:
        return {}


def write_rates(folder: Path, rates: Mapping[str, Rate]) -> None:
    """Keep new measurements for the next start; on a full disk they are lost."""
    if rates == read_rates(folder):
        return
    with contextlib.suppress(OSError):
        write_json(folder / FILE, {name: _rounded(rate) for name, rate in rates.items()})


def _rounded(rate: Rate) -> dict[str, Any]:
    return {name: round(getattr(rate, name), 3) for name in Rate.__slots__}
