"""What a folder that a user names is: a run, one of its stages, or a checkpoint.

A run's folder has RUN/STAGE/checkpoints/iter_XXXXXXX. Every verb takes any of the four: one that
works on runs finds the run around a folder (`run_of`), one that works on checkpoints finds the
checkpoint inside (`stage_in`, which find.py uses).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.config.paths import download_hint
from megatron_hypenet.config.schema import STAGES
from megatron_hypenet.errors import CheckpointError, DataError
from megatron_hypenet.untrusted.files import has_entry

ASSEMBLED = "assembled"
"""Folder of a run with the student before its stage 2."""
_UP = 3
"""Levels from iter_XXXXXXX up to its run."""


def is_run(folder: Path) -> bool:
    """Return whether `folder` is a run's; a checkpoint has a config.yaml as well, beside its
    weights."""
    return has_entry(folder / fmt.CONFIG) and not (
        fmt.is_committed(folder)
        or fmt.iteration_of(folder) is not None
        or (folder / fmt.MODEL_JSON).is_file()
    )


def refuse_missing(path: Path) -> None:
    """Raise CheckpointError where nothing is at `path`, from which a model is to be read."""
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; give a checkpoint, or the folder of a stage or run that has "
            f"one{download_hint(path)}"
        )


def run_of(path: Path) -> Path:
    """Return the run that `path` means: itself, or the run that this stage, export or checkpoint
    lies in. DataError that names what was looked for where there is none."""
    for place in (path, *_around(path)):
        if is_run(place):
            return place
    if not path.exists():
        raise DataError(f"{path} does not exist; give the output_dir of a run{download_hint(path)}")
    inside = [entry.name for entry in _entries(path) if is_run(entry)]
    raise DataError(
        f"{path} is not a run folder, and lies in none: neither it nor the {_UP} folders above "
        f"have the {fmt.CONFIG} of a run; give the output_dir of a run, or a stage or checkpoint "
        "in it" + (f". It holds runs: {', '.join(inside)}" if inside else "")
    )


def run_around(path: Path) -> Path | None:
    """Return the run that `path` is or lies in, or None."""
    return next((place for place in (path, *_around(path)) if is_run(place)), None)


def trained_in(run: Path) -> list[Path]:
    """Return the folders of a run that hold a student's checkpoint, the one that was made last
    first: stages with a save, and the student that is assembled behind the first of them."""
    in_order = [run / name for name in (STAGES[0], ASSEMBLED, *STAGES[1:])]
    return [
        folder
        for folder in reversed(in_order)
        if fmt.is_committed(folder) or fmt.iteration_folders(folder / fmt.CHECKPOINTS)
    ]


def _entries(path: Path) -> list[Path]:
    """Return what a folder holds; nothing for a file."""
    return sorted(path.iterdir()) if path.is_dir() else []


def _around(path: Path) -> Iterator[Path]:
    """Yield the folders above `path`, nearest first, as the user would write them."""
    whole = path.absolute()
    for level in range(min(_UP, len(whole.parents))):
        yield path.parents[level] if level < len(path.parents) else whole.parents[level]
