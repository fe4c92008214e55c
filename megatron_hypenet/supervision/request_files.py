"""Files by which a person asks something of a run, put into its folder or a stage's folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

STOP = "STOP"
"""Save, then leave; the next start is refused until the file is gone."""
SAVE_NOW = "SAVE_NOW"
"""Save and go on; the file is removed."""


def stop_file(places: Iterable[Path]) -> Path | None:
    """The STOP file that is there now, if any."""
    return next((place / STOP for place in places if (place / STOP).exists()), None)
