"""Find slow ranks: compare every rank's own time per step once per log interval.

Ranks that wait for each other take equally long for a step, so only the time of forward passes is
compared: under data parallelism and ZeRO 1 and 2 they do not wait for another rank, and a processor
that is throttled, shared or faulty is slow in them too. Tensor, context and ZeRO-3 parallelism
communicate inside the forward pass: there the ranks of one group take equally long, and a slow
group is named by all of its ranks. Pipeline stages differ in work, so ranks are compared within
their stage.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_hypenet.engine.own_time import OwnTime
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.agreement import gather_to_all
from megatron_hypenet.process_place import host_name

SLOW = 1.3
"""A rank is slow when it takes this many times the median of its peers,"""
INTERVALS = 3
"""in this many log intervals in a row."""

_NOISE_SECONDS = 0.005
"""Smaller differences per step are ignored; they are common for the tiny models of tests."""
_LONGEST_LIST = 8


@dataclass(frozen=True, slots=True)
class SlowRank:
    """A rank that has been slow for several intervals."""

    rank: int
    host: str
    ratio: float
    """Its time over its peers' median."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} {self.ratio:.1f}x"


class StepTimes:
    """Compares the ranks at every log interval. All processes create one, and call `compare` in the
    same steps."""

    def __init__(self, clock: OwnTime) -> None:
        """Gather the ranks' hosts and pipeline stages; collective."""
        self.clock = clock
        self.places: list[tuple[str, int]] = gather_to_all(
            (host_name(), groups.pipeline_stage()[0])
        )
        self._slow_for = [0] * len(self.places)

    def compare(self, steps: int) -> tuple[dict[str, float], list[SlowRank]]:
        """Return (min, median and max over the ranks of the milliseconds per step in the last
        `steps` steps, slow ranks), the same on all processes."""
        seconds = groups.gather_numbers(self.clock.take() / max(steps, 1))
        points = {
            "speed/rank-time-min-ms": 1000 * min(seconds),
            "speed/rank-time-median-ms": 1000 * statistics.median(seconds),
            "speed/rank-time-max-ms": 1000 * max(seconds),
        }
        return points, self._judge(seconds)

    def _judge(self, seconds: Sequence[float]) -> list[SlowRank]:
        usual: dict[int, float] = {}
        for stage in {stage for _, stage in self.places}:
            usual[stage] = statistics.median_low(
                [own for own, place in zip(seconds, self.places, strict=True) if place[1] == stage]
            )
        slow = []
        for rank, (own, (host, stage)) in enumerate(zip(seconds, self.places, strict=True)):
            late = own > SLOW * usual[stage] and own - usual[stage] > _NOISE_SECONDS
            self._slow_for[rank] = self._slow_for[rank] + 1 if late else 0
            if self._slow_for[rank] >= INTERVALS:
                slow.append(SlowRank(rank, host, own / max(usual[stage], 1e-9)))
        return sorted(slow, key=lambda found: -found.ratio)


def named(slow: Sequence[SlowRank]) -> str:
    """Return the slow ranks in a few words, the slowest first; empty when there are none."""
    more = f", and {len(slow) - _LONGEST_LIST} more" if len(slow) > _LONGEST_LIST else ""
    return ", ".join(str(rank) for rank in slow[:_LONGEST_LIST]) + more
