"""How sure a measurement is: intervals in which the value of much more data would lie, for the
error bars of figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

NORMAL_95 = 1.959964
"""Half the width of the interval that holds 95 % of a normal distribution, in standard
deviations."""


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean of independent `values`; None for fewer than two."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def share_interval(percent: float, count: int) -> tuple[float, float]:
    """Return the ends, in %, of the 95 % interval of a share of which `percent` % of `count`
    independent trials came true: Wilson's score interval (Wilson 1927), which also has a width at
    0 and 100 %. The share lies inside, whatever is rounded."""
    share = min(max(percent / 100, 0.0), 1.0)
    square = NORMAL_95**2 / count
    middle = (share + square / 2) / (1 + square)
    half = NORMAL_95 / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return 100 * min(max(middle - half, 0.0), share), 100 * max(min(middle + half, 1.0), share)
