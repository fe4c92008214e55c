"""Tensors in and out of Megatron's sharded format, without its writer processes and without torch.distributed where one process does.

On disk this is what `megatron.core.dist_checkpointing` writes and reads (backend torch_dist: torch's distributed checkpoint plus
metadata.json and common.pt). Megatron's own writer starts a manager and forks one process per file, which costs seconds per save and
leaves processes behind when a worker dies; the planners here hand its ShardedTensors to torch's writer and reader directly.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_hypenet.checkpoint.safety import check_common, load_restricted
from megatron_hypenet.errors import CheckpointError

METADATA = ".metadata"
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is produced only while it is written, so that a converter never holds a whole model."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Shard:
    """One local piece of the global tensor `key`: `data` lies at `offset` inside `global_shape`."""

    key: str
    data: Tensor | LazyTensor
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]

    @classmethod
    def whole(cls, key: str, data: Tensor | LazyTensor) -> Shard:
        """The shard that is the whole tensor."""
        return cls(key, data, tuple(data.shape), (0,) * len(data.shape))


class _SavePlanner(DefaultSavePlanner):
    """Plans one write per Shard; data is fetched when its turn comes. The global plan checks that shards tile their tensors."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.shards = {(shard.key, torch.Size(shard.offset)): shard for shard in shards}

    def create_local_plan(self) -> SavePlan:
        items = []
        for (key, offset), shard in self.shards.items():
            chunk = ChunkStorageMetadata(offsets=offset, sizes=torch.Size(shard.data.shape))
            data = TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=shard.data.dtype), size=torch.Size(shard.global_shape))
            items.append(WriteItem(index=MetadataIndex(key, offset), type=WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items=items)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)  # checks bounds and overlap; coverage only across several processes
        for key, stored in metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata) and sum(math.prod(c.sizes) for c in stored.chunks) != math.prod(stored.size):
                raise ValueError(f"the shards of {key} do not tile its shape {tuple(stored.size)}")
        return plans, metadata

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        shard = self.shards[write_item.index.fqn, torch.Size(write_item.index.offset or ())]
        data = shard.data.load() if isinstance(shard.data, LazyTensor) else shard.data
        if tuple(data.shape) != tuple(shard.data.shape) or data.dtype != shard.data.dtype:
            raise CheckpointError(
                f"{shard.key}: announced as {shard.data.dtype} {tuple(shard.data.shape)}, got {data.dtype} {tuple(data.shape)}"
            )
        return data.detach().contiguous()


class _Writer(dcp.FileSystemWriter):
    """torch's writer with one file per rank, that lets go of each tensor once it is written, plus Megatron's two files.

    The (temporary, absolute) folder name that torch would note in the metadata is left out.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        # torch's own loop keeps every tensor of a file alive until the file is closed
        results = []
        if plan.items:
            name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
            with (Path(self.path) / name).open("wb") as stream:
                for item in plan.items:
                    start = stream.tell()
                    data = planner.resolve_data(item)
                    assert isinstance(data, Tensor)
                    torch.save(_compact(data), stream)
                    length = stream.tell() - start
                    results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
                stream.flush()
                os.fsync(stream.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def storage_meta(self) -> StorageMeta | None:
        return None

    def finish(self, metadata: Metadata, results: Any) -> None:
        # Here, on the coordinating rank, a failure reaches all processes.
        super().finish(metadata, results)
        (Path(self.path) / "metadata.json").write_text(json.dumps(BACKEND))
        torch.save({}, Path(self.path) / "common.pt")  # megatron-core <= 0.18 refuses to load without it


def _compact(tensor: Tensor) -> Tensor:
    """On the CPU, and alone in its storage: torch.save writes whole storages."""
    tensor = tensor.detach().cpu()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size() else tensor


def distributed() -> bool:
    """Whether more than one process takes part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def write_shards(folder: Path, shards: Iterable[Shard], *, alone: bool = False) -> None:
    """Write this process's shards into `folder` (created if needed); collective over all processes when there are several.

    `alone`: the calling process writes everything and no other takes part, whether or not there are others. Shards of one key must
    tile its global shape exactly once over all processes. Raises CheckpointError or OSError.
    """
    alone = alone or not distributed()
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that it assumes a single process
        try:
            dcp.save({}, storage_writer=_Writer(folder), planner=_SavePlanner(list(shards)), no_dist=alone)
        except dcp.api.CheckpointException as error:
            first = next(iter(error.failures.values()))[0]
            raise first if isinstance(first, OSError | CheckpointError) else CheckpointError(f"cannot write {folder}: {first}") from error


class _LoadPlanner(DefaultLoadPlanner):
    """Copies stored pieces into given targets; `targets[key, offset]` is the tensor that starts at `offset`."""

    def __init__(self, targets: Mapping[tuple[str, torch.Size], Tensor]) -> None:
        super().__init__()
        self.targets = targets

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self.targets[read_item.dest_index.fqn, torch.Size(read_item.dest_index.offset or ())]
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(axis, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: resolve_tensor returned a view of the target."""


class ShardReader(Mapping[str, Tensor]):
    """The tensors of one sharded folder by global name; each access reads that tensor whole, on the CPU, in its stored dtype."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        for name in ("metadata.json", METADATA):
            if not (self.folder / name).is_file():
                raise CheckpointError(f"{self.folder} is not a Megatron sharded checkpoint: {name} is missing; use another checkpoint")
        if (self.folder / "common.pt").is_file():
            check_common(self.folder / "common.pt")
        self._metadata = load_restricted(self.folder / METADATA)
        state = self._metadata.state_dict_metadata
        self._tensors: dict[str, TensorStorageMetadata] = {k: v for k, v in state.items() if isinstance(v, TensorStorageMetadata)}
        for info in self._metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise CheckpointError(f"{self.folder / METADATA} points outside its folder ({info.relative_path!r}); nothing was loaded")
        self._reader = dcp.FileSystemReader(self.folder)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, key: object) -> bool:
        return key in self._tensors

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape of one tensor, without reading it."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Stored dtype of one tensor, without reading it."""
        return self._tensors[key].properties.dtype

    def __getitem__(self, key: str) -> Tensor:
        whole = torch.empty(self._tensors[key].size, dtype=self.dtype(key))
        self.read_into([(key, (0,) * whole.dim(), whole)])
        return whole

    def read_into(self, requests: Iterable[tuple[str, Sequence[int], Tensor]]) -> None:
        """Fill each target tensor with the part of `key` that starts at the given global offset, casting to the target's dtype."""
        targets: dict[tuple[str, torch.Size], Tensor] = {}
        items: list[ReadItem] = []
        for key, start, target in requests:
            offset = torch.Size(start)
            targets[key, offset] = target
            found = create_read_items_for_chunk_list(key, self._tensors[key], [ChunkStorageMetadata(offset, target.shape)])
            if sum(math.prod(item.lengths) for item in found) != target.numel():
                raise CheckpointError(
                    f"{self.folder}: the stored pieces of {key} do not cover it; the checkpoint is damaged, use another one"
                )
            items += found
        try:
            self._reader.read_data(LoadPlan(items), _LoadPlanner(targets)).wait()
        except Exception as error:  # a damaged file surfaces as almost anything: pickle, zip, struct and OS errors
            raise CheckpointError(f"{self.folder} cannot be read: {type(error).__name__}: {error}; use another checkpoint") from error


def tensor_pieces(entry: Any) -> list[Any]:
    """The Megatron ShardedTensors behind one sharded_state_dict entry: itself, or what its factory splits it into."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    built = list(nested_values({"": entry.build()})) if isinstance(entry, ShardedTensorFactory) else [entry]
    pieces = [piece for piece in built if isinstance(piece, ShardedTensor)]
    for piece in pieces:
        # Only Megatron's own distributed optimizer flattens shards, and DeepSpeed stands in its place here.
        assert piece.flattened_range is None, f"{piece.key} is a flattened shard"
    return pieces


def is_main_replica(piece: Any) -> bool:
    """Whether this process is the one that writes this piece (replica index 0 on every axis)."""
    replica = piece.replica_id
    return all(index == 0 for index in replica) if isinstance(replica, tuple) else replica == 0


def piece_shard(piece: Any) -> Shard:
    """A Megatron ShardedTensor with data as a Shard, with its prepended axes written out."""
    data = piece.data.view((1,) * piece.prepend_axis_num + tuple(piece.local_shape))
    return Shard(piece.key, data, tuple(piece.global_shape), tuple(piece.global_offset))
