"""Find a checkpoint and read its small files. No tensor library is imported here, because a command
that only starts processes needs none."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint.manifest import (
    KIND,
    file_problems,
    read_listed,
    read_manifest,
    verify_files,
)
from megatron_hypenet.checkpoint.places import is_run, refuse_missing, trained_in
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.errors import CheckpointError, ConfigError
from megatron_hypenet.untrusted.json_text import parse_json

logger = logging.getLogger(__name__)


def resolve(path: Path | str, *, fall_back: bool = True) -> Path:
    """Return the committed checkpoint meant by `path`: the folder itself, the newest usable
    iter_XXXXXXX folder in it or its checkpoints/, or that of the stage that a run trained last.

    With `fall_back`, an older save replaces a newest one that is uncommitted or damaged, with a
    warning that names both; without it that is an error, as for the checkpoint that a training
    stage starts from, and a run is one that names its stages. Raises CheckpointError.
    """
    path = Path(path)
    if fmt.is_committed(path):
        return path
    refuse_missing(path)
    if is_run(path):
        return _resolve_run(path, fall_back=fall_back)
    candidates = fmt.iteration_folders(path) or fmt.iteration_folders(path / fmt.CHECKPOINTS)
    skipped: list[str] = []
    for folder in reversed(candidates):
        reason = _why_unusable(folder)
        if reason is None:
            if skipped:
                logger.warning("using the older checkpoint %s: %s", folder, "; ".join(skipped))
            return folder
        if not fall_back:
            raise CheckpointError(
                f"{folder}, the newest save in {path}, cannot be used: {reason}; restore it, "
                "or name an older one"
            )
        skipped.append(f"{folder.name} is skipped ({reason})")
    if skipped:
        raise CheckpointError(
            f"{path} holds no usable checkpoint: {'; '.join(skipped)}; restore one of them or "
            "start again"
        )
    if (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} is a Hugging Face folder, not a checkpoint; import it first: "
            f"hypenet convert import {path} CKPT_DIR"
        )
    raise CheckpointError(
        f"{path} is not a checkpoint: it has neither a {fmt.COMMITTED} marker (written last, "
        "so its save may not have finished) nor "
        "iter_XXXXXXX folders, and it is no run (config.yaml); give a finished checkpoint, or the "
        "folder of a stage or run that holds one"
    )


def _resolve_run(run: Path, *, fall_back: bool) -> Path:
    """Return the checkpoint of the stage that a run trained last. Raises CheckpointError."""
    stages = trained_in(run)
    if not stages:
        raise CheckpointError(
            f"{run} is a run that has saved no checkpoint of a student yet; continue it with "
            f"`hypenet run {run / fmt.CONFIG}`"
        )
    if not fall_back:
        raise CheckpointError(
            f"{run} is a run; say which of its checkpoints: {', '.join(map(str, stages))}"
        )
    return resolve(stages[0])


def read_model_config(path: Path | str) -> ModelConfig:
    """Return the model configuration stored with the weights."""
    folder = resolve(path)
    file = folder / fmt.MODEL_JSON
    text = KIND.decode(file, read_listed(folder, fmt.MODEL_JSON))
    parse_json(KIND, file, text)  # limits the size of what pydantic then parses
    try:
        return ModelConfig.from_json(text)
    except ConfigError as error:
        KIND.refuse(file, error)


def finished_checkpoint(stage_folder: Path, train_iters: int) -> Path | None:
    """Return the checkpoint of a training stage that has done all its steps, or None; an incomplete
    one does not count. Presence and sizes decide; a reader of the checkpoint compares hashes."""
    done = [
        folder
        for folder in fmt.iteration_folders(stage_folder / fmt.CHECKPOINTS)
        if (fmt.iteration_of(folder) or 0) >= train_iters
    ]
    return next((folder for folder in reversed(done) if is_whole(folder)), None)


def is_whole(folder: Path) -> bool:
    """Return whether a checkpoint is committed and all its files are present with their sizes; a
    warning says why it is not."""
    reason = _why_unusable(folder)
    if reason is not None and folder.exists():
        logger.warning("%s cannot be used: %s", folder, reason)
    return reason is None


def tokenizer_dir(path: Path | str) -> Path | None:
    """Return the checkpoint's tokenizer folder, or None when it was saved without one.
    CheckpointError unless its files are as written."""
    folder = resolve(path)
    verify_files(folder, hashes=True, parts=(fmt.TOKENIZER,))
    return folder / fmt.TOKENIZER if (folder / fmt.TOKENIZER).is_dir() else None


def _why_unusable(folder: Path) -> str | None:
    """Say why a training save cannot be continued from, or None; sizes only, hashes are checked
    when it is loaded."""
    if not fmt.is_committed(folder):
        return "its save was never committed"
    try:
        problems = file_problems(folder, read_manifest(folder), hashes=False)
    except CheckpointError as error:
        return str(error)
    return f"damaged: {problems[0]}" if problems else None
