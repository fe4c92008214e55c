"""How good a run's estimates of its own time were, from its log: said beside true.

    .venv/bin/hypenet demo
    .venv/bin/python tools/bench/eta.py runs/demo

Prints what the run had last said at 10, 30, 60 and 90 % of its time, and first after each new
start, beside the time that it then took; exit code 1 when one of them is further off than --limit,
1.5 by default. Time between two starts does not count. Only a finished run has a true time.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from megatron_hypenet.cli.status import seconds_of

SHARES = (0.1, 0.3, 0.6, 0.9)
LIMIT = 1.5
SLACK_SECONDS = 2.0
"""Both times are in whole seconds: what is off by less says nothing."""

_STAMP = re.compile(r"^(\d{4}-\S+) (.*)$")
# the first line of a start: device, precision and processes
_BEGINS = re.compile(r"; \d+ process(es)?\b.*, ZeRO \d$")
_ENDS = re.compile(r"^\[(\d+)/\1\] \w+: done")
_LEFT = re.compile(r"(?:whole run: |% done, )(\S+) left")


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """One estimate of the time that is left for the whole run."""

    start: int
    """Start of the run, from 0."""
    worked: float
    """Seconds of work until then, in all starts."""
    left: float


def read(log: Path) -> tuple[list[Said], float]:
    """Return all estimates in a run's log, and its seconds of work. Raises ValueError for a run
    that is not finished."""
    said: list[Said] = []
    start, worked, previous, began, finished = -1, 0.0, 0.0, False, False
    for line in log.read_text(encoding="utf-8").splitlines():
        match = _STAMP.match(line)
        if match is None:
            continue
        try:
            moment = datetime.fromisoformat(match.group(1)).timestamp()
        except ValueError:
            continue
        text = match.group(2).strip()
        if _BEGINS.search(text):
            start, began = start + 1, True  # what passed since the last line is between two starts
        elif began:
            worked += moment - previous
        previous, finished = moment, _ENDS.match(text) is not None
        found = _LEFT.search(text)
        left = seconds_of(found.group(1)) if found else None
        if left is not None and began:
            said.append(Said(start=start, worked=worked, left=left))
    if not finished:
        raise ValueError(f"{log}: the run has not ended, so that no true time is known")
    return said, worked


def rows(said: list[Said], total: float) -> list[tuple[str, float | None, float]]:
    """Return (when, seconds said or None, seconds that were true) at SHARES and after each new
    start."""
    found: list[tuple[str, float | None, float]] = []
    for share in SHARES:
        before = [one for one in said if one.worked <= share * total]
        one = before[-1] if before else None
        true = total - (one.worked if one else share * total)
        found.append((f"{share:.0%}", one.left if one else None, true))
    for start in sorted({one.start for one in said} - {0}):
        one = next(one for one in said if one.start == start)
        found.append((f"start {start + 1}", one.left, total - one.worked))
    return found


def off(said: float | None, true: float) -> float:
    """Return how many times too much or too little was said; 1 within SLACK_SECONDS, and where
    nothing was said."""
    if said is None or abs(said - true) <= SLACK_SECONDS:
        return 1.0
    return max(said, true) / max(min(said, true), 1.0)


def main() -> int:
    """Print the table, or with --json its rows."""
    parser = argparse.ArgumentParser(description="Estimates of a finished run beside the truth.")
    parser.add_argument("run", type=Path, help="run folder, e.g. runs/demo")
    parser.add_argument("--limit", type=float, default=LIMIT, help="largest factor off (1.5)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        table = rows(*read(options.run / "logs" / "hypenet.log"))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 5
    if options.json:
        print(json.dumps({"rows": [[*row, off(*row[1:])] for row in table]}))
    else:
        print(f"{'at':<10}{'said s':>10}{'true s':>10}{'factor':>8}")
        for at, said, true in table:
            shown = "-" if said is None else f"{said:.0f}"
            print(f"{at:<10}{shown:>10}{true:>10.0f}{off(said, true):>8.2f}")
    return int(any(off(said, true) > options.limit for _, said, true in table))


if __name__ == "__main__":
    sys.exit(main())
