"""What holds a GPU back while it works: its clock and power, as its driver sees them."""

from __future__ import annotations

import os
import shutil
import subprocess
from statistics import median
from types import TracebackType

QUERY = [
    "nvidia-smi",
    "--query-gpu=clocks.sm,power.draw,power.limit",
    "--format=csv,noheader,nounits",
    "--loop-ms=100",
]

SAMPLES = 10
"""Fewest that count: the driver's power is an average over a second, so shorter work would be mixed
with what was before it."""


class GpuPower:
    """Around some work on the first GPU that CUDA sees: medians of what it ran at, ten times a
    second.

    Without a driver, and of work shorter than a second, all stay None."""

    clock_mhz: float | None = None
    watts: float | None = None
    limit_watts: float | None = None

    def __enter__(self) -> GpuPower:
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        self._watch = (
            subprocess.Popen([*QUERY, f"--id={first}"], stdout=subprocess.PIPE, text=True)
            if shutil.which(QUERY[0])
            else None
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._watch is None:
            return
        self._watch.terminate()
        lines, _ = self._watch.communicate()
        self.read(lines)

    def read(self, lines: str) -> None:
        """Take the medians of the driver's lines; broken ones, as the last may be, do not count."""
        samples = []
        for line in lines.splitlines():
            try:
                clock, watts, limit = (float(part) for part in line.split(","))
            except ValueError:
                continue
            samples.append((clock, watts, limit))
        if len(samples) >= SAMPLES:
            self.clock_mhz, self.watts, self.limit_watts = (
                median(column) for column in zip(*samples, strict=True)
            )
