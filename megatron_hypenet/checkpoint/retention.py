"""Decide which checkpoints of a run stay on the disk. This happens after a commit only, so the
newest save is never at risk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_hypenet.atomic_files import temporary_beside
from megatron_hypenet.checkpoint import format as fmt


def surplus(folders: list[Path], *, keep_last: int, keep_every: int | None) -> list[Path]:
    """The committed iter_XXXXXXX `folders` that are neither among the newest `keep_last` nor at a
    multiple of `keep_every`."""
    ordered = sorted(folders, key=lambda folder: fmt.iteration_of(folder) or 0)
    old = ordered[: -max(keep_last, 1)]
    return [
        folder
        for folder in old
        if not (keep_every and (fmt.iteration_of(folder) or 0) % keep_every == 0)
    ]


def prune(parent: Path, *, keep_last: int, keep_every: int | None = None) -> list[Path]:
    """Delete surplus committed checkpoints of `parent` and return them; uncommitted folders and
    links are not touched."""
    removed = surplus(
        [folder for folder in fmt.iteration_folders(parent) if fmt.is_committed(folder)],
        keep_last=keep_last,
        keep_every=keep_every,
    )
    for folder in removed:
        # Renamed first: a deletion that is cut short must not leave half a checkpoint under a valid
        # name, nor under one that is given back its valid name by the next start.
        doomed = temporary_beside(folder, kind="del")
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return removed
