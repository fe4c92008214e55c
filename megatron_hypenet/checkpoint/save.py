"""Writing checkpoints: whole tensors from one process (converter, assembly), and the full state of a training run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint.manifest import write_manifest
from megatron_hypenet.checkpoint.shards import LazyTensor, Shard, write_shards
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.errors import CheckpointError


def write_weights(
    folder: Path | str,
    tensors: Mapping[str, Tensor | LazyTensor],
    model_config: ModelConfig,
    *,
    kind: str,
    tokenizer_dir: Path | None = None,
    extra: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write whole tensors under their canonical names as a committed checkpoint, from one process; returns the folder.

    LazyTensor values are produced one at a time, so memory stays at one tensor. Tensors keep their dtype. `extra` goes into the
    manifest ("hf_config" and "stage" are known there). Raises CheckpointError when the folder exists, or the disk is full.
    """
    folder = Path(folder)
    if not tensors:
        raise CheckpointError(f"{folder}: there are no tensors to write")
    with fmt.staged(folder, overwrite=overwrite) as temporary:
        write_shards(temporary / fmt.WEIGHTS, [Shard.whole(key, tensor) for key, tensor in tensors.items()])
        (temporary / fmt.MODEL_JSON).write_text(model_config.to_json())
        copy_tokenizer(tokenizer_dir, temporary)
        write_manifest(temporary, kind=kind, extra=extra)
    return folder


def copy_tokenizer(source: Path | None, folder: Path) -> None:
    """Copy the tokenizer's files into `folder`/tokenizer; nothing when `source` is None, CheckpointError when it is not there."""
    if source is None:
        return
    if not source.is_dir():
        raise CheckpointError(f"tokenizer folder {source} does not exist; point to the folder with tokenizer.json, or leave it out")
    shutil.copytree(source, folder / fmt.TOKENIZER, copy_function=shutil.copyfile)
