"""Writing checkpoints: whole tensors from one process (converter, assembly), and the full state of a training run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint.manifest import FileEntry, hash_file, write_manifest
from megatron_hypenet.checkpoint.rng import gather_state
from megatron_hypenet.checkpoint.shards import LazyTensor, Shard, distributed, is_main_replica, piece_shard, tensor_pieces, write_shards
from megatron_hypenet.checkpoint.state import EngineState, TrainState
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
        write_shards(temporary / fmt.WEIGHTS, [Shard.whole(key, tensor) for key, tensor in tensors.items()], alone=True)
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


def save_training(
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
) -> Path:
    """Write everything that continues a run, as a committed checkpoint; called by all processes, returns the folder.

    Each data-parallel rank writes the parameters whose index it owns. On any failure the temporary folder is removed on rank 0 and all
    processes raise CheckpointError; older checkpoints are untouched.
    """
    folder = Path(folder)
    with _staged_by_all(folder, overwrite=overwrite) as temporary:
        for name, shards in ((fmt.WEIGHTS, _weight_shards(engine)), (fmt.OPTIMIZER, _optimizer_shards(engine))):
            write_shards(temporary / name, shards)
            del shards
        generators = gather_state()
        known = _hashes_of_own_files(temporary)
        if _is_first():
            save_file(generators, temporary / fmt.RNG)
            state.write(temporary / fmt.TRAIN_STATE)
            (temporary / fmt.MODEL_JSON).write_text(model_config.to_json())
            if config_yaml is not None:
                (temporary / fmt.CONFIG).write_text(config_yaml)
            copy_tokenizer(tokenizer_dir, temporary)
            write_manifest(temporary, kind=kind, stage=state.stage, extra={"step": state.step, **(extra or {})}, known=known)
    return folder


def _weight_shards(engine: EngineState) -> list[Shard]:
    """This process's share of the model weights, in the model's dtype."""
    shards = []
    for entry in engine.template:
        owned = entry.index % engine.data_size == engine.data_rank
        with engine.gathered(entry.parameter):
            if owned:
                shards += _main_shards(entry.described(entry.parameter.detach().to("cpu", copy=True)))
    return shards


def _optimizer_shards(engine: EngineState) -> list[Shard]:
    """This process's share of the fp32 master weights and Adam moments."""
    shards = []
    for entry in engine.template:
        owned = entry.index % engine.data_size == engine.data_rank
        for name in fmt.OPTIMIZER_STATES:
            value = engine.full_state(entry.parameter, name)
            if owned:
                shards += _main_shards(entry.described(value.to("cpu", copy=True), prefix=f"optim.{name}"))
    return shards


def _main_shards(described: Any) -> list[Shard]:
    return [piece_shard(piece) for piece in tensor_pieces(described) if is_main_replica(piece)]


def _hashes_of_own_files(temporary: Path) -> dict[str, FileEntry]:
    """Hashes of the data files, each taken by the rank that wrote it; all of them on rank 0. Collective."""
    own = f"__{dist.get_rank() if distributed() else 0}_*.distcp"
    found: dict[str, FileEntry] = {}
    failure: OSError | None = None
    try:
        found = {path.relative_to(temporary).as_posix(): hash_file(path) for path in temporary.rglob(own)}
    except OSError as error:
        failure = error  # the others wait in the gather below
    if not distributed():
        gathered: list[Any] = [(found, failure)]
    else:
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (found, failure))
    for _, fault in gathered:
        if fault is not None:
            raise fault
    return {name: entry for part, _ in gathered for name, entry in part.items()}


@contextmanager
def _staged_by_all(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """fmt.staged for a group of processes: rank 0 makes, commits and removes the folder, and all agree on success before the commit."""
    temporary = fmt.temporary_sibling(target, _from_first(os.getpid()))
    failure: BaseException | None = None
    try:
        with _first_fails_for_all(target):
            if _is_first():
                fmt.refuse_existing(target, overwrite)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
        try:
            yield temporary
        except Exception as error:
            failure = fmt.as_checkpoint_error(error, target)
        _agree(failure)
        with _first_fails_for_all(target):
            if _is_first():
                fmt.commit(temporary, target, overwrite=overwrite)
    except BaseException:
        if _is_first():
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _agree(failure: BaseException | None) -> None:
    """Raise on every process when any of them failed: its own error where it has one, else the first other's message."""
    messages: list[str | None] = [str(failure) if failure else None]
    if distributed():
        messages = [None] * dist.get_world_size()
        dist.all_gather_object(messages, str(failure) if failure else None)
    if failure is not None:
        raise failure
    first = next((message for message in messages if message), None)
    if first is not None:
        raise CheckpointError(first)


@contextmanager
def _first_fails_for_all(target: Path) -> Iterator[None]:
    """A block that only rank 0 works in: its failure is raised on every process."""
    failure: BaseException | None = None
    try:
        yield
    except Exception as error:
        failure = fmt.as_checkpoint_error(error, target)
    _agree(failure)


def _from_first(value: int) -> int:
    box = [value]
    if distributed():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _is_first() -> bool:
    return not distributed() or dist.get_rank() == 0
