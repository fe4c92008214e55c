"""The checkpoint folder: the name of each file, and how a folder becomes visible only when it is
complete.

    weights/          tensors in Megatron's sharded format (`dist_checkpointing`, backend
                      torch_dist) under canonical names
    optimizer/        the same format, keys optim.{fp32_param,exp_avg,exp_avg_sq}.<canonical name>
    model.json        ModelConfig
    train_state.json  step, data position, ...
    rng.safetensors   random generators
    config.yaml       resolved run configuration
    tokenizer/        Hugging Face tokenizer files, when known
    manifest.json     kind, stage, versions, and size and sha256 of every other file
    COMMITTED         sha256 of manifest.json; written last, after every file above has reached
                      the disk (empty in version 0.1's folders)

optimizer/, train_state.json, rng.safetensors and config.yaml exist after training only.

`manifest.json` has a `format_version`, now 1. It is raised when a reader of the previous version
would misread a folder; a folder of a greater version is refused, every smaller one is read. A file
that is read has to be listed in manifest.json; a file that is not listed is not read.

A save is written into the sibling `.<name>.tmp-<pid>` and renamed: a folder under its final name is
complete, or was damaged later.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_hypenet.atomic_files import (
    is_being_deleted,
    target_of,
    temporary_beside,
    was_replaced,
)
from megatron_hypenet.errors import CheckpointError, SetupError, is_disk_full

WEIGHTS = "weights"
OPTIMIZER = "optimizer"
TOKENIZER = "tokenizer"
MODEL_JSON = "model.json"
TRAIN_STATE = "train_state.json"
RNG = "rng.safetensors"
CONFIG = "config.yaml"
MANIFEST = "manifest.json"
COMMITTED = "COMMITTED"

TENSORS_SUFFIX = ".distcp"
"""End of the name of every file with tensors, in weights/ and optimizer/."""

CHECKPOINTS = "checkpoints"
"""Folder of a training stage that holds its saves, an iter_XXXXXXX folder each."""

OPTIMIZER_STATES = ("fp32_param", "exp_avg", "exp_avg_sq")
"""Adam's state per parameter: fp32 master weight and the two moments, each stored under its
canonical name."""

_ITERATION = re.compile(r"iter_(\d{7,})")


def iteration_name(step: int) -> str:
    """Return the folder name of the save after `step` optimizer steps: iter_0000120."""
    return f"iter_{step:07d}"


def iteration_of(folder: Path) -> int | None:
    """Return the step in a folder's name, or None when it is not an iter_XXXXXXX folder."""
    match = _ITERATION.fullmatch(folder.name)
    return int(match.group(1)) if match else None


def iteration_folders(parent: Path) -> list[Path]:
    """Return the iter_XXXXXXX folders directly under `parent`, committed or not, oldest first;
    symbolic links are left out."""
    if not parent.is_dir():
        return []
    found = [
        entry
        for entry in parent.iterdir()
        if iteration_of(entry) is not None and entry.is_dir() and not entry.is_symlink()
    ]
    return sorted(found, key=lambda entry: iteration_of(entry) or 0)


def is_committed(folder: Path) -> bool:
    """Return whether the commit marker exists; later damage is not checked (see
    manifest.verify_files)."""
    return (folder / COMMITTED).is_file()


def fsync_path(path: Path) -> None:
    """Flush one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush every file below `folder`, every folder and `folder` itself to the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            fsync_path(Path(root) / name)
        fsync_path(Path(root))


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Raise CheckpointError if something exists at `target` and may not be replaced."""
    if (target.exists() or target.is_symlink()) and not overwrite:
        raise CheckpointError(
            f"{target} already exists; choose another folder, or allow overwriting (--overwrite)"
        )


def commit(temporary: Path, target: Path, *, overwrite: bool) -> None:
    """Make the finished `temporary` folder visible as `target`: fsync, marker, rename, fsync of the
    parent."""
    fsync_tree(temporary)
    manifest = temporary / MANIFEST
    (temporary / COMMITTED).write_text(
        hashlib.sha256(manifest.read_bytes()).hexdigest() + "\n" if manifest.is_file() else ""
    )
    fsync_path(temporary / COMMITTED)
    fsync_path(temporary)
    refuse_existing(target, overwrite)
    put_in_place(temporary, target)


def put_in_place(temporary: Path, target: Path) -> None:
    """Rename the folder `temporary` to `target`. A folder that is there comes back if the rename
    fails, and is deleted after it."""
    aside = None
    if target.exists():
        aside = temporary_beside(target, kind="old")
        os.replace(target, aside)
    try:
        os.replace(temporary, target)
    except OSError:
        if aside is not None:
            os.replace(aside, target)
        raise
    fsync_path(target.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def remove_stale(parent: Path) -> list[Path]:
    """Delete what interrupted saves left under `parent` and return it. Only for a folder with one
    writer: a run's own checkpoints.

    A save that only lacks its last rename (the marker is written after everything else has reached
    the disk) gets its final name, and so does one that was being replaced and whose replacement is
    missing. The rest of a save that was being deleted is deleted.
    """
    stale = []
    left = (
        [(entry, target) for entry in parent.iterdir() if (target := target_of(entry)) is not None]
        if parent.is_dir()
        else []
    )
    # a finished save takes precedence over the one that it replaces
    for entry, target in sorted(left, key=lambda pair: (was_replaced(pair[0]), pair[0])):
        whole = is_committed(entry) and not is_being_deleted(entry)
        if whole and not (target.exists() or target.is_symlink()):
            os.replace(entry, target)
            fsync_path(parent)
        else:
            stale.append(entry)
    for entry in stale:
        shutil.rmtree(entry, ignore_errors=True)
    return stale


@contextmanager
def staged(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Make a temporary folder that becomes `target` when the block ends without an exception;
    removed otherwise. One process only."""
    refuse_existing(target, overwrite)
    temporary = temporary_beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        commit(temporary, target, overwrite=overwrite)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise as_checkpoint_error(error, target) from error


def error_of_save(target: Path) -> Callable[[BaseException], BaseException]:
    """Return the function that translates errors of the save of `target`; see
    `as_checkpoint_error`."""
    return lambda error: as_checkpoint_error(error, target)


def as_checkpoint_error(error: BaseException, target: Path) -> BaseException:
    """Return the error to raise for a failed save of `target`: SetupError for a full disk,
    CheckpointError for other I/O errors, else the error itself."""
    if is_disk_full(error):
        return SetupError(
            f"cannot save {target}: no space left on the disk; the unfinished save was removed and "
            "older "
            "checkpoints are untouched. Free space, or lower checkpoint.keep_last, "
            "and start the same command again"
        )
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if not isinstance(cause, OSError):
        return error
    return CheckpointError(
        f"cannot save {target}: {cause}; the unfinished save was removed and older checkpoints are "
        "untouched"
    )
