"""Request files: a user puts them into a run's folder, or a stage's folder, to make the run save or
stop."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

STOP = "STOP"
"""Name of the file that asks a run to save and stop; the next start is refused until it is
deleted."""
SAVE_NOW = "SAVE_NOW"
"""Name of the file that asks a run to save and go on; the run removes it."""


def stop_file(places: Iterable[Path]) -> Path | None:
    """Return the STOP file that exists now, if any."""
    return next((place / STOP for place in places if (place / STOP).exists()), None)
