"""Measure how long a step, an evaluation and a save take, and from that how early before its time
limit a run needs a signal: <run folder>/timing.json.

    stages          the same figures for every training stage that has run in this folder
    step_seconds, evaluate_seconds, save_seconds, margin_seconds, grace_seconds
                    of the stage that needs the most time to stop

A request to stop (signals.py) just after a step boundary waits for a whole step, perhaps for the
evaluation after it, and for a save; where saves are written in the background, also for the pending
one. `hypenet submit` asks SLURM for a signal that long before the limit.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from pathlib import Path
from typing import Any

from megatron_hypenet.atomic_files import write_json
from megatron_hypenet.errors import DataError
from megatron_hypenet.untrusted.files import FileKind
from megatron_hypenet.untrusted.json_text import read_typed

FILE = "timing.json"
_KIND = FileKind(error=DataError, advice="it is measured again", max_bytes=1 << 20)

MARGIN_SECONDS = 30.0
"""Seconds added for what is not measured: delivery of the signal, and the end of the processes."""
VARIATION = 0.5
"""Factor by which steps and saves may take longer than the slowest measured one, e.g. on a busy
file system."""

_REMEMBERED = 100


class Timing:
    """Measurements of one stage; the slowest of the last hundred counts."""

    def __init__(self, stage: str, *, background: bool) -> None:
        """Start without measurements; with `background`, saves may be pending while training goes
        on."""
        self.stage = stage
        self.background = background
        self._steps: deque[float] = deque(maxlen=_REMEMBERED)
        self._evaluations: deque[float] = deque(maxlen=_REMEMBERED)
        self._saves: deque[float] = deque(maxlen=_REMEMBERED)

    def step(self, seconds: float) -> None:
        """Record that a step took `seconds`."""
        self._steps.append(seconds)

    def evaluation(self, seconds: float) -> None:
        """Record that the evaluation after a step took `seconds`."""
        self._evaluations.append(seconds)

    def save(self, seconds: float) -> None:
        """Record that a save took `seconds` from its request to its commit."""
        self._saves.append(seconds)

    def figures(self) -> dict[str, float]:
        """Return the stage's fields of timing.json."""
        step, evaluation, save = (
            max(values, default=0.0) for values in (self._steps, self._evaluations, self._saves)
        )
        work = step + evaluation + save * (2 if self.background else 1)
        margin = MARGIN_SECONDS + VARIATION * work
        return {
            "step_seconds": round(step, 3),
            "evaluate_seconds": round(evaluation, 3),
            "save_seconds": round(save, 3),
            "margin_seconds": round(margin, 3),
            "grace_seconds": math.ceil(work + margin),
        }

    def write(self, folder: Path) -> None:
        """Write the figures into the folder's file; on a full disk they are lost, and training goes
        on."""
        stages = {**read(folder).get("stages", {}), self.stage: self.figures()}
        longest = max(stages.values(), key=lambda figures: figures["grace_seconds"])
        with contextlib.suppress(OSError):
            write_json(folder / FILE, {**longest, "stages": stages})


def read(folder: Path) -> dict[str, Any]:
    """Return the content of a run folder's timing.json; empty when there is none that can be
    read."""
    try:
        return read_typed(
            _KIND, folder / FILE, dict[str, int | float | dict[str, dict[str, int | float]]]
        )
    except DataError:
        return {}
