"""How long a step, an evaluation and a save take, and so how early a run must hear that its time is
over: <run folder>/timing.json.

    stages          the same figures for every training stage that has run in this folder
    step_seconds, evaluate_seconds, save_seconds, margin_seconds, grace_seconds
                    of the stage that needs the most time to leave

A request to leave (signals.py) that comes just after a step's edge waits for a whole step, perhaps
for the evaluation after it, and for a save; where saves are written in the background, for the one
that is pending as well. `hypenet submit` asks SLURM for a signal that early.
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
"""For what is not measured: the signal's way to the processes, and their end."""
VARIATION = 0.5
"""Steps and saves may take this much longer than any that was measured, e.g. on a busy file
system."""

_REMEMBERED = 100


class Timing:
    """What one stage has measured; the slowest of the last hundred counts."""

    def __init__(self, stage: str, *, background: bool) -> None:
        """`background`: saves may be pending while training goes on."""
        self.stage = stage
        self.background = background
        self._steps: deque[float] = deque(maxlen=_REMEMBERED)
        self._evaluations: deque[float] = deque(maxlen=_REMEMBERED)
        self._saves: deque[float] = deque(maxlen=_REMEMBERED)

    def step(self, seconds: float) -> None:
        """A step took `seconds`."""
        self._steps.append(seconds)

    def evaluation(self, seconds: float) -> None:
        """The evaluation after a step took `seconds`."""
        self._evaluations.append(seconds)

    def save(self, seconds: float) -> None:
        """A save took `seconds` from its request to its commit."""
        self._saves.append(seconds)

    def figures(self) -> dict[str, float]:
        """The fields of a stage."""
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
        """Put the figures into the folder's file; a disk that is full costs them and nothing
        else."""
        stages = {**read(folder).get("stages", {}), self.stage: self.figures()}
        longest = max(stages.values(), key=lambda figures: figures["grace_seconds"])
        with contextlib.suppress(OSError):
            write_json(folder / FILE, {**longest, "stages": stages})


def read(folder: Path) -> dict[str, Any]:
    """The content of a run folder's timing.json; empty when there is none that can be read."""
    try:
        return read_typed(
            _KIND, folder / FILE, dict[str, int | float | dict[str, dict[str, int | float]]]
        )
    except DataError:
        return {}
