"""Read checkpoints: weights, and filling a model of any parallel layout. find.py finds a checkpoint
and its shape."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint.find import read_model_config, resolve, tokenizer_dir
from megatron_hypenet.checkpoint.manifest import (
    WEIGHTS_PARTS,
    Manifest,
    file_problems,
    hash_problems,
    is_as_written,
    is_part,
    read_manifest,
    refuse_damaged,
    remember,
    verify_files,
)
from megatron_hypenet.checkpoint.rng import load_rng
from megatron_hypenet.checkpoint.shards import ShardReader, tensor_pieces
from megatron_hypenet.checkpoint.state import EngineState, TrainState, empty_like_entry
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.errors import CheckpointError
from megatron_hypenet.parallel.agreement import (
    agree,
    distributed,
    from_first,
    gather_to_all,
    is_first,
)

__all__ = [
    "Manifest",
    "comparing_hashes",
    "load_model",
    "load_sharded",
    "load_training",
    "newest_of_run",
    "open_weights",
    "read_manifest",
    "read_model_config",
    "read_whole_config",
    "read_weights",
    "resolve",
    "tokenizer_dir",
    "verify_files",
    "verify_together",
]

logger = logging.getLogger(__name__)

_SMALL_PARTS = (
    fmt.MODEL_JSON,
    *(f"{fmt.WEIGHTS}/{name}" for name in (".metadata", "metadata.json", "common.pt")),
)
"""What a reader of the weights needs besides the files with tensors."""


def newest_of_run(checkpoints: Path) -> Path | None:
    """Return the checkpoint a run continues from, the same on every process, or None when nothing
    was ever committed; collective.

    The first process searches, and removes what interrupted saves left; only the one writer of this
    folder may call it, before it saves.
    """
    found: Path | None = None
    failure: Exception | None = None
    if is_first():
        try:
            fmt.remove_stale(checkpoints)
            if any(fmt.is_committed(folder) for folder in fmt.iteration_folders(checkpoints)):
                found = resolve(checkpoints)
        except (CheckpointError, OSError) as error:
            failure = error
    agree(failure)
    chosen: Path | None = from_first(found)
    return chosen


def open_weights(path: Path | str, *, hashes: bool = True) -> ShardReader:
    """Return the weights as a read-only mapping that reads one tensor per access, after their
    hashes were compared; by one process. Without `hashes` those of the files with tensors are left
    to `comparing_hashes`."""
    folder = resolve(path)
    if not hashes:
        verify_files(folder, parts=WEIGHTS_PARTS)
        verify_files(folder, hashes=True, parts=_SMALL_PARTS)
    else:
        verify_files(folder, hashes=True, parts=WEIGHTS_PARTS)
    return ShardReader(folder / fmt.WEIGHTS)


@contextmanager
def comparing_hashes(folder: Path) -> Iterator[None]:
    """Compare the weights' files with their hashes while the block reads them, in another thread.

    CheckpointError at the end of the block when one differs: also in place of an error of the
    block, which may have come from the damage."""
    with ThreadPoolExecutor(1, "hashes") as pool:
        compared = pool.submit(_compare_hashes, folder)
        try:
            yield
        except Exception:
            compared.result()
            raise
        compared.result()


def _compare_hashes(folder: Path) -> None:
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        if is_part(name, (fmt.WEIGHTS,)) and (folder / name).is_file():
            is_as_written(folder / name, entry, past_cache=True)  # remembers the hash
    verify_files(folder, hashes=True, parts=WEIGHTS_PARTS)


def read_weights(path: Path | str, keys: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Read whole tensors by canonical name, on the CPU in their stored dtype; all of them, or
    `keys` (CheckpointError names missing ones)."""
    reader = open_weights(path)
    wanted = list(reader if keys is None else keys)
    missing = [key for key in wanted if key not in reader]
    if missing:
        raise CheckpointError(
            f"{path} lacks {_some(missing)}; it holds {len(reader)} tensors, e.g. "
            f"{_some(sorted(reader))}"
        )
    return {key: reader[key] for key in wanted}


def read_whole_config(path: Path | str) -> ModelConfig:
    """Return the configuration of a whole model, for building it: CheckpointError when the
    checkpoint holds fewer values than that has.

    This keeps a damaged model.json with huge sizes from allocating more memory than the files
    justify.
    """
    folder = resolve(path)
    config = read_model_config(folder)
    reader = ShardReader(folder / fmt.WEIGHTS)
    held = sum(math.prod(reader.shape(key)) for key in reader)
    if held < config.least_values:
        raise CheckpointError(
            f"{path} holds {held:,} values, a model as its {fmt.MODEL_JSON} describes has more "
            f"than {config.least_values:,}; "
            "the checkpoint is damaged or no whole model, use another one"
        )
    return config


def load_model(model: Any, path: Path | str, *, allow_unused: bool = False) -> Path:
    """Fill `model` from a checkpoint of any layout after comparing its hashes; returns the folder
    that was read.

    `model` needs `sharded_state_dict(prefix)`; every process of the layout calls this with its own
    part. They share the hashing, and compare names; no other communication is needed. Strict: a
    tensor that either side lacks, or whose global shape differs, is a CheckpointError;
    `allow_unused` tolerates stored tensors that no process asks for (a trunk-only teacher).
    Floating dtypes are cast to the model's.
    """
    folder = resolve(path)
    verify_together(folder, parts=WEIGHTS_PARTS)
    load_sharded(
        ShardReader(folder / fmt.WEIGHTS),
        model.sharded_state_dict(prefix=""),
        allow_unused=allow_unused,
    )
    return folder


@torch.no_grad()
def load_sharded(
    reader: ShardReader, sharded_state_dict: dict[str, Any], *, allow_unused: bool = False
) -> None:
    """Copy stored values into the tensors of a sharded state dict in place, one entry at a time."""
    entries = {
        name: entry
        for name, entry in sharded_state_dict.items()
        if getattr(entry, "data", None) is not None
    }
    pieces = {name: found for name, entry in entries.items() if (found := tensor_pieces(entry))}
    check_fit(
        reader, [piece for found in pieces.values() for piece in found], allow_unused=allow_unused
    )
    rounded = [
        name
        for name, found in pieces.items()
        if reader.dtype(found[0].key).itemsize > entries[name].data.element_size()
    ]
    if rounded:
        logger.info(
            "%d tensors of %s are stored in a wider dtype and rounded to the model's",
            len(rounded),
            reader.folder,
        )
    for name, entry in entries.items():
        if name in pieces:
            entry.data.copy_(read_entry(reader, entry))


def read_entry(reader: ShardReader, entry: Any) -> Tensor:
    """Return the stored value of one sharded_state_dict entry as one local tensor, on the CPU in
    the stored dtype."""
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    def read(piece: Any) -> Any:
        if not isinstance(piece, ShardedTensor):
            return piece
        local = torch.empty(
            (1,) * piece.prepend_axis_num + tuple(piece.local_shape), dtype=reader.dtype(piece.key)
        )
        reader.read_into([(piece.key, piece.global_offset, local)])
        return local.view(tuple(piece.local_shape))

    if isinstance(entry, ShardedTensorFactory):
        return entry.merge_fn(dict_list_map_inplace(read, {"": entry.build()})[""])
    return read(entry)


@torch.no_grad()
def load_training(
    folder: Path | str, engine: EngineState, *, model_config: ModelConfig, stage: str
) -> TrainState:
    """Continue from a committed training save: weights, optimizer state and random generators;
    returns its train state. All processes of any layout and ZeRO stage call it, and share the
    hashing of its files. CheckpointError when the save is damaged, of another stage or model, or of
    another precision.
    """
    folder = Path(folder)
    verify_together(folder)
    state = TrainState.read(folder)
    if state.stage != stage or read_model_config(folder) != model_config:
        what = (
            f"stage {state.stage}, not {stage}"
            if state.stage != stage
            else "a model of another shape"
        )
        raise CheckpointError(
            f"{folder} is a save of {what}; use the output folder of the run that wrote it, "
            "or another one for a new run"
        )
    weights, optimizer = ShardReader(folder / fmt.WEIGHTS), ShardReader(folder / fmt.OPTIMIZER)
    whole = [
        entry.described(empty_like_entry(entry, entry.parameter.dtype), owned=False)
        for entry in engine.template
    ]
    check_fit(weights, [piece for described in whole for piece in tensor_pieces(described)])
    stored = {weights.dtype(key) for key in weights} - {
        entry.parameter.dtype for entry in engine.template
    }
    if stored:
        raise CheckpointError(
            f"{folder} was trained in {stored.pop()}, this run is in another precision; "
            "set `precision` as it was"
        )
    engine.init_optimizer_state(state.adam_step)
    for entry, described in zip(engine.template, whole, strict=True):
        for name in fmt.OPTIMIZER_STATES:
            wanted = entry.described(
                empty_like_entry(entry, torch.float32), prefix=f"optim.{name}", owned=False
            )
            engine.set_full_state(entry.parameter, name, read_entry(optimizer, wanted))
        engine.set_weight(entry.parameter, read_entry(weights, described))
    load_rng(folder / fmt.RNG)
    return state


def verify_together(folder: Path, *, parts: Collection[str] = ()) -> None:
    """Compare the files of a checkpoint, or `parts` of it, with their hashes, divided among the
    processes; collective.

    All raise CheckpointError when one finds damage. Files that were compared before and have not
    changed are not read again.
    """
    own, world = (dist.get_rank(), dist.get_world_size()) if distributed() else (0, 1)
    problems: list[str] = []
    failure: Exception | None = None
    manifest = None
    try:
        manifest = read_manifest(folder)
        # large files first, so that all processes hash about the same number of bytes
        names = sorted(
            (name for name in manifest.files if is_part(name, parts)),
            key=lambda name: -manifest.files[name].bytes,
        )
        problems = file_problems(folder, manifest, hashes=False, parts=parts)
        if not problems:
            share = replace(
                manifest, files={name: manifest.files[name] for name in names[own::world]}
            )
            problems = hash_problems(folder, share)
    except (CheckpointError, OSError) as error:
        failure = error
    agree(failure)
    refuse_damaged(
        folder, list(dict.fromkeys(line for part in gather_to_all(problems) for line in part))
    )
    assert manifest is not None
    remember(folder, manifest, names)


def check_fit(reader: ShardReader, pieces: list[Any], *, allow_unused: bool = False) -> None:
    """Raise CheckpointError unless names, shapes and kinds of dtype of `pieces` (over all
    processes) agree with what is stored."""
    wanted = {piece.key: tuple(piece.global_shape) for piece in pieces}
    missing = sorted(key for key in wanted if key not in reader)
    shapes = [
        f"{key}: stored {reader.shape(key)}, model {shape}"
        for key, shape in wanted.items()
        if key in reader and reader.shape(key) != shape
    ]
    kinds = [
        f"{piece.key}: stored {reader.dtype(piece.key)}, model {piece.dtype}"
        for piece in pieces
        if piece.key in reader
        and reader.dtype(piece.key).is_floating_point != piece.dtype.is_floating_point
    ]
    gathered = gather_to_all((sorted(wanted), missing, shapes, kinds))
    asked = {key for keys, *_ in gathered for key in keys}
    missing, shapes, kinds = (
        sorted({line for row in gathered for line in row[column]}) for column in (1, 2, 3)
    )
    unused = [] if allow_unused else sorted(key for key in reader if key not in asked)
    problems = [
        f"{len(lines)} {what}: {_some(lines)}"
        for what, lines in (
            ("tensors of the model are not in it", missing),
            ("stored tensors have no place in the model", unused),
            ("shapes differ", shapes),
            ("dtypes differ", kinds),
        )
        if lines
    ]
    if problems:
        raise CheckpointError(
            f"{reader.folder} does not fit the model: {'; '.join(problems)}. "
            f"Build the model from the checkpoint's own {fmt.MODEL_JSON}, "
            "or choose the checkpoint of this model"
        )


def _some(lines: list[str]) -> str:
    return ", ".join(lines[:3]) + (f" and {len(lines) - 3} more" if len(lines) > 3 else "")
