"""Decide which checkpoints of a run stay on the disk, and how much of them. This happens after a
commit only, so the newest save is never at risk."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from megatron_hypenet.atomic_files import temporary_beside
from megatron_hypenet.checkpoint import format as fmt


def surplus(folders: list[Path], *, keep_last: int, keep_every: int | None) -> list[Path]:
    """Return the committed iter_XXXXXXX `folders` that are neither among the newest `keep_last` nor
    at a multiple of `keep_every`."""
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
        delete(folder)
    return removed


def delete(folder: Path) -> None:
    """Delete one checkpoint."""
    # Renamed first: a deletion that is cut short must not leave half a checkpoint under a valid
    # name, nor under one that is given back its valid name by the next start.
    doomed = temporary_beside(folder, kind="del")
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def drop_optimizer(folder: Path) -> int:
    """Leave a committed checkpoint its weights, without the state that training goes on from; the
    bytes that were freed.

    The new folder shares its files with the old one and takes its place as a new save would.
    """
    raw = json.loads((folder / fmt.MANIFEST).read_text(encoding="utf-8"))
    files = {name: entry for name, entry in raw["files"].items() if not _is_optimizer(name)}
    freed = sum(entry["bytes"] for name, entry in raw["files"].items() if _is_optimizer(name))
    if not freed:
        return 0
    with fmt.staged(folder, overwrite=True) as temporary:
        for name in files:
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(folder / name, target)
        text = json.dumps({**raw, "files": files}, indent=2, sort_keys=True) + "\n"
        (temporary / fmt.MANIFEST).write_text(text, encoding="utf-8")
    return freed


def finish(parent: Path) -> int:
    """Keep of a finished stage the weights of its newest committed checkpoint alone; returns the
    bytes of optimizer state that were freed."""
    prune(parent, keep_last=1)
    newest = [folder for folder in fmt.iteration_folders(parent) if fmt.is_committed(folder)]
    return drop_optimizer(newest[-1]) if newest else 0


def _is_optimizer(name: str) -> bool:
    return name.startswith(f"{fmt.OPTIMIZER}/")
