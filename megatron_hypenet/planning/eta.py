"""Estimate the work of each step of a run, and from measured speeds the time that is left.

Work is counted in floating-point operations as in model/flops.py. A step that runs is
extrapolated from its own speed. A step that has not begun takes its work over a speed that was
measured, in this start or an earlier one (<run folder>/rates.json): a training stage over that of
another stage, scaled by how well their kinds use the machine, and a step of forward passes alone
over that of other forward passes (the check of the teacher, layer selection, evaluations during
training), because the two kinds of work differ between machines by more than their operations say.
Steps that move files take as long as the import of the teacher did. There is no estimate before a
training stage has been measured where one is left.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hypenet.atomic_files import write_json
from megatron_hypenet.config.schema import STAGES
from megatron_hypenet.errors import DataError
from megatron_hypenet.planning.planned_work import Planned
from megatron_hypenet.stages.spec import stage_spec
from megatron_hypenet.untrusted.files import FileKind
from megatron_hypenet.untrusted.json_text import read_typed

FILE = "rates.json"
_KIND = FileKind(error=DataError, advice="it is measured again", max_bytes=1 << 20)

FORWARD_USE = 0.4
"""Share of the peak that forward passes alone are taken to reach, as `StageSpec.mfu`; it counts
where no forward passes have been measured."""

DRAWING = 3.0
"""Time of the report's figures and page over that of the one figure of layer selection: 2.9 s and
0.9 s in the recorded demo of tests/unit/planning/demo_timings.json."""

EVALUATION = "evaluate"
SAVE = "save"

_MARKS = 400
"""Progress reports that are remembered of a step."""
_SETTLED_MARKS = 3
_SETTLED_SECONDS = 1.0
"""Reports and seconds of a training stage before its speed counts: the first steps are slower."""


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
    """Seconds before its first part: models are built and loaded, kernels compiled."""
    after_seconds: float = 0.0
    """Seconds after its last part: results are written and drawn."""
    evaluate_seconds: float = 0.0
    forward_flops_per_second: float = 0.0
    """Operations per second of the evaluations inside a training stage of a whole student."""
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
        self.order = tuple(planned)
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
        taken = self._pauses.setdefault(kind, [])
        taken.append(seconds)
        if self._current is None:
            return
        self._current.paused += seconds
        name = self._current.name
        rate = self.rates.setdefault(name, Rate())
        late = taken[len(taken) // 2 :]  # the first one compiles, too
        seconds = sum(late) / len(late)
        if kind == SAVE:
            rate.save_seconds = seconds
            return
        rate.evaluate_seconds = seconds
        planned = self.left.get(name, Planned())
        if name in STAGES and stage_spec(name).through_head and seconds > 0:
            rate.forward_flops_per_second = planned.evaluation_flops / seconds

    def finish(self, step: str) -> None:
        """Record that `step` is done."""
        self.left.pop(step, None)
        current = self._current
        if current is not None and current.name == step:
            rate = self.rates.setdefault(step, Rate())
            rate.seconds += self.now() - current.began
            if current.marks:
                last = current.marks[-1]
                rate.after_seconds = self.now() - last[0] - (current.paused - last[2])
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
        """Return the seconds to the end; None before what is left can be told from a measured
        speed."""
        computes = [name for name, work in self.left.items() if work.flops]
        if any(self._flops_per_second(name) is None for name in computes):
            return None
        seconds = 0.0
        for name in self.left:
            current = self._current is not None and self._current.name == name
            seconds += self._rest() if current else self._whole(name)
        return seconds

    def _measure(self, current: _Current) -> None:
        """Take the speed of the current step from its reports."""
        planned = self.left.get(current.name, Planned())
        rate = self.rates.setdefault(current.name, Rate())
        trains = current.name in STAGES
        first, last = current.marks[0], current.marks[-1]
        # the beginning is slower: kernels are compiled, caches filled; and machines are shared
        begin = current.marks[(len(current.marks) - 1) // 2]
        busy = (last[0] - begin[0]) - (last[2] - begin[2])
        settled = not trains or (
            len(current.marks) >= _SETTLED_MARKS and last[0] - first[0] >= _SETTLED_SECONDS
        )
        if planned.flops and settled and busy > 0 and last[1] > begin[1]:
            rate.flops_per_second = planned.flops * (last[1] - begin[1]) / busy
            part = min(first[1], current.marks[1][1] - first[1])
            own = part * planned.flops / rate.flops_per_second
            rate.before_seconds = max(0.0, first[0] - current.began - own)

    def _flops_per_second(self, step: str) -> float | None:
        """Return the operations per second of a step: its own, or by the latest step of its kind
        that was measured; None where nothing is known."""
        own = self.rates.get(step)
        if own is not None and own.flops_per_second > 0:
            return own.flops_per_second
        forward = self._forward_speed()
        if step not in STAGES and forward is not None:
            return forward
        for name in reversed(STAGES):
            rate = self.rates.get(name, Rate())
            if rate.flops_per_second > 0:
                return rate.flops_per_second / use_of(name) * use_of(step)
        return None

    def _forward_speed(self) -> float | None:
        """Return the operations per second of forward passes alone, by the latest step that had
        some; None where they were not measured."""
        for name in reversed(self.order):
            rate = self.rates.get(name, Rate())
            found = rate.forward_flops_per_second if name in STAGES else rate.flops_per_second
            if found > 0:
                return found
        return None

    def _whole(self, step: str) -> float:
        """Return the seconds that a step takes which has not begun in this start."""
        planned = self.left[step]
        if not planned.flops:
            moved = self.rates.get(step) or self.rates.get("teacher")
            return moved.seconds if moved is not None else 0.0
        return (
            self._before(step)
            + self._computing(step, 1.0)
            + self._pauses_left(step, 1.0)
            + self._after(step)
        )

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
        running = self._computing(current.name, left) + self._after(current.name)
        return max(0.0, running - since) + self._pauses_left(current.name, left)

    def _computing(self, step: str, share: float) -> float:
        speed = self._flops_per_second(step)
        return 0.0 if not speed else share * self.left[step].flops / speed

    def _before(self, step: str) -> float:
        """Return the seconds before the first part of a step: its own of an earlier start, or those
        of the steps of its kind that were measured."""
        return self._like(step, "before_seconds")

    def _after(self, step: str) -> float:
        """Return the seconds after the last part of a step, as `_before`; the figures of a report
        that has not been made take DRAWING times those of layer selection."""
        own = self.rates.get(step, Rate()).after_seconds
        drawn = self.rates.get("select", Rate()).after_seconds
        if step == "report" and not own and drawn:
            return DRAWING * drawn
        return self._like(step, "after_seconds")

    def _like(self, step: str, name: str) -> float:
        """Return a time of a step that its work does not decide: its own of an earlier start, or
        the mean of those of the steps of its kind."""
        own = self.rates.get(step)
        if own is not None and getattr(own, name) > 0:
            return float(getattr(own, name))
        kind = [
            getattr(rate, name)
            for other, rate in self.rates.items()
            if (other in STAGES) == (step in STAGES) and getattr(rate, name) > 0
        ]
        return sum(kind) / len(kind) if kind else 0.0

    def _pauses_left(self, step: str, share: float) -> float:
        """Return the seconds of the evaluations and saves in the last `share` of a step."""
        planned = self.left[step]
        if not planned.evaluations:
            return 0.0
        rate = self.rates.get(step, Rate())
        speed = self._forward_speed() or self._flops_per_second(step)
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
