"""Pieces of tensors, and reading them out of Megatron's sharded format on any layout; shard_writer.py is the other direction.

On disk this is what `megatron.core.dist_checkpointing` writes and reads (backend torch_dist: torch's distributed checkpoint plus
metadata.json and common.pt). The planner here hands its ShardedTensors to torch's reader directly; one process needs no
torch.distributed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_hypenet.checkpoint.safety import check_common, load_restricted
from megatron_hypenet.errors import CheckpointError

METADATA = ".metadata"
"""The file that says which tensors a sharded folder holds and where their pieces lie."""


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

    def pieces(self, key: str) -> int:
        """How many pieces one tensor is stored in: what its writer's layout made of it."""
        return len(self._tensors[key].chunks)

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
