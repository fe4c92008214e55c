"""Write checkpoints: whole tensors from one process (converter, assembly), or the full state of a
training run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from megatron_hypenet.atomic_files import temporary_beside
from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint.manifest import FileEntry, write_manifest
from megatron_hypenet.checkpoint.pending import PendingSave
from megatron_hypenet.checkpoint.rng import gather_state
from megatron_hypenet.checkpoint.shard_writer import ShardWrite, stream_shards, write_shards
from megatron_hypenet.checkpoint.shards import (
    LazyTensor,
    Shard,
    StreamedTensor,
    is_main_replica,
    piece_shard,
    tensor_pieces,
)
from megatron_hypenet.checkpoint.state import EngineState, TrainState
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.errors import CheckpointError
from megatron_hypenet.parallel.agreement import failing_together, from_first, is_first


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
    """Write whole tensors under their canonical names as a committed checkpoint, from one process;
    returns the folder.

    LazyTensor values are produced one at a time, so memory stays at one tensor. Tensors keep their
    dtype. `extra` goes into the manifest (which has fields of its own for "hf_config" and "stage").
    Raises CheckpointError when the folder exists or there are no tensors, SetupError when the disk
    is full.
    """
    if not tensors:
        raise CheckpointError(f"{folder}: there are no tensors to write")
    shards = [Shard.whole(key, tensor) for key, tensor in tensors.items()]
    return _commit_weights(
        Path(folder),
        lambda weights: write_shards(weights, shards),
        model_config,
        kind=kind,
        tokenizer_dir=tokenizer_dir,
        extra=extra,
        overwrite=overwrite,
    )


def stream_weights(
    folder: Path | str,
    tensors: Mapping[str, StreamedTensor],
    model_config: ModelConfig,
    *,
    kind: str,
    tokenizer_dir: Path | None = None,
    extra: dict[str, Any] | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write the same as `write_weights`, to the byte, from tensors that are produced in pieces, by
    several threads and in bounded memory; see `stream.write_files`. SetupError when the disk has
    too little space, before anything is written."""
    return _commit_weights(
        Path(folder),
        lambda weights: stream_shards(weights, tensors, workers=workers, progress=progress),
        model_config,
        kind=kind,
        tokenizer_dir=tokenizer_dir,
        extra=extra,
        overwrite=overwrite,
    )


def _commit_weights(
    folder: Path,
    write: Callable[[Path], dict[str, FileEntry]],
    model_config: ModelConfig,
    *,
    kind: str,
    tokenizer_dir: Path | None,
    extra: dict[str, Any] | None,
    overwrite: bool,
) -> Path:
    """Make the folder, whose tensors `write` writes into the weights' folder that it is given."""
    with fmt.staged(folder, overwrite=overwrite) as temporary:
        hashed = write(temporary / fmt.WEIGHTS)
        (temporary / fmt.MODEL_JSON).write_text(model_config.to_json())
        copy_tokenizer(tokenizer_dir, temporary)
        known = {f"{fmt.WEIGHTS}/{name}": entry for name, entry in hashed.items()}
        write_manifest(temporary, kind=kind, extra=extra, known=known)
    return folder


def copy_tokenizer(source: Path | None, folder: Path) -> None:
    """Copy the tokenizer's files into `folder`/tokenizer; does nothing when `source` is None,
    raises CheckpointError when it does not exist."""
    if source is None:
        return
    if not source.is_dir():
        raise CheckpointError(
            f"tokenizer folder {source} does not exist; point to the folder with tokenizer.json, "
            "or leave it out"
        )
    shutil.copytree(source, folder / fmt.TOKENIZER, copy_function=shutil.copyfile)
    # copytree gives it the mode of its source, which may be a private temporary folder
    shutil.copymode(folder, folder / fmt.TOKENIZER)


def begin_save(
    folder: Path | str,
    engine: EngineState,
    state: TrainState,
    *,
    model_config: ModelConfig,
    kind: str,
    config_yaml: str | None = None,
    tokenizer_dir: Path | None = None,
    extra: dict[str, Any] | None = None,
    overwrite: bool = True,
    background: bool = False,
) -> PendingSave:
    """Begin to save everything that continues a run; `PendingSave.commit` completes it. All
    processes call this.

    Each data-parallel rank copies and writes the parameters whose index it owns. With `background`
    the copies of all of them are taken here (on the CPU: weights and 12 bytes of state per owned
    parameter) and files are written by a thread; otherwise files are written here, one part after
    the other. Both write the same bytes. On any failure the temporary folder is removed and all
    processes raise.
    """
    folder = Path(folder)
    temporary = temporary_beside(folder, pid=from_first(os.getpid()))
    manifest = {"kind": kind, "stage": state.stage, "extra": {"step": state.step, **(extra or {})}}
    save = PendingSave(folder, temporary, overwrite=overwrite, manifest=manifest)
    try:
        with failing_together(fmt.error_of_save(folder)):
            if is_first():
                fmt.refuse_existing(folder, overwrite)
                _make_folders(temporary)
        for name, copy_shards in (
            (fmt.WEIGHTS, _weight_shards),
            (fmt.OPTIMIZER, _optimizer_shards),
        ):
            with failing_together(fmt.error_of_save(folder)):
                shards = copy_shards(engine)
            save.add(ShardWrite(temporary / name, shards))
            del shards
            if not background:
                save.write()
        generators = gather_state()

        def small_files() -> None:
            save_file(generators, temporary / fmt.RNG)
            state.write(temporary / fmt.TRAIN_STATE)
            (temporary / fmt.MODEL_JSON).write_text(model_config.to_json())
            if config_yaml is not None:
                (temporary / fmt.CONFIG).write_text(config_yaml)
            copy_tokenizer(tokenizer_dir, temporary)

        save.add_small_files(small_files)
    except BaseException:
        save.abandon()
        raise
    if background:
        save.write_in_background()
    return save


def _make_folders(temporary: Path) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    for name in (fmt.WEIGHTS, fmt.OPTIMIZER):
        (temporary / name).mkdir(parents=True)


def _weight_shards(engine: EngineState) -> list[Shard]:
    """Return this process's share of the model weights, in the model's dtype."""
    shards = []
    for entry in engine.template:
        owned = entry.index % engine.data_size == engine.data_rank
        with engine.gathered(entry.parameter):
            if owned:
                shards += _main_shards(
                    entry.described(entry.parameter.detach().to("cpu", copy=True))
                )
    return shards


def _optimizer_shards(engine: EngineState) -> list[Shard]:
    """Return this process's share of the fp32 master weights and Adam moments."""
    shards = []
    for entry in engine.template:
        owned = entry.index % engine.data_size == engine.data_rank
        for name in fmt.OPTIMIZER_STATES:
            value = engine.full_state(entry.parameter, name)
            if owned:
                shards += _main_shards(
                    entry.described(value.to("cpu", copy=True), prefix=f"optim.{name}")
                )
    return shards


def _main_shards(described: Any) -> list[Shard]:
    return [piece_shard(piece) for piece in tensor_pieces(described) if is_main_replica(piece)]
