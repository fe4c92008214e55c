"""Pieces of tensors, and reading them out of Megatron's sharded format on any layout;
shard_writer.py is the other direction.

The format on disk is that of `megatron.core.dist_checkpointing` (backend torch_dist: torch's
distributed checkpoint plus metadata.json and common.pt). It is read here without torch's reader,
which trusts the files; one process needs no torch.distributed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_hypenet.checkpoint.safety import PICKLE, check_common
from megatron_hypenet.checkpoint.shard_index import METADATA, overlaps, read_index
from megatron_hypenet.checkpoint.stored_tensor import read_tensor
from megatron_hypenet.errors import CheckpointError
from megatron_hypenet.untrusted.files import has_entry


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is produced only while it is written, so that a converter never holds a whole
    model."""

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


class ShardReader(Mapping[str, Tensor]):
    """The tensors of one sharded folder by global name; each access reads that tensor whole, on the
    CPU, in its stored dtype."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        for name in ("metadata.json", METADATA):
            if not (self.folder / name).is_file():
                raise CheckpointError(
                    f"{self.folder} is not a Megatron sharded checkpoint: {name} is missing; "
                    "use another checkpoint"
                )
        if has_entry(self.folder / "common.pt"):
            check_common(self.folder / "common.pt")
        self._tensors = read_index(self.folder)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, key: object) -> bool:
        return key in self._tensors

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape of one tensor, without reading it."""
        return self._tensors[key].shape

    def dtype(self, key: str) -> torch.dtype:
        """Stored dtype of one tensor, without reading it."""
        return self._tensors[key].dtype

    def pieces(self, key: str) -> int:
        """Number of pieces in which one tensor is stored, which depends on its writer's layout."""
        return len(self._tensors[key].pieces)

    def __getitem__(self, key: str) -> Tensor:
        whole = torch.empty(self.shape(key), dtype=self.dtype(key))
        self.read_into([(key, (0,) * whole.dim(), whole)])
        return whole

    def read_into(self, requests: Iterable[tuple[str, Sequence[int], Tensor]]) -> None:
        """Fill each target tensor with the part of `key` that starts at the given global offset,
        casting to the target's dtype.

        CheckpointError when a stored piece cannot be read, or is not what the folder's index says.
        """
        with contextlib.ExitStack() as stack:
            streams: dict[Path, BinaryIO] = {}
            for key, start, target in requests:
                stored = self._tensors[key]
                origin = tuple(start)
                filled = 0
                for piece, offset, shape in overlaps(stored, origin, tuple(target.shape)):
                    if piece.file not in streams:
                        streams[piece.file] = stack.enter_context(PICKLE.open(piece.file))
                    value = read_tensor(
                        piece.file,
                        streams[piece.file],
                        piece.start,
                        piece.length,
                        shape=piece.shape,
                        dtype=stored.dtype,
                    )
                    _part(target, offset, origin, shape).copy_(
                        _part(value, offset, piece.offset, shape)
                    )
                    filled += math.prod(shape)
                if filled != target.numel():
                    PICKLE.refuse(
                        self.folder,
                        f"the stored pieces of {key} do not cover {list(target.shape)} at "
                        f"{list(origin)}",
                    )


def _part(
    tensor: Tensor, offset: Sequence[int], origin: Sequence[int], shape: Sequence[int]
) -> Tensor:
    """The view of `shape` at the global `offset` of a tensor that itself lies at `origin`."""
    for axis, (start, length) in enumerate(zip(offset, shape, strict=True)):
        tensor = tensor.narrow(axis, start - origin[axis], length)
    return tensor


def tensor_pieces(entry: Any) -> list[Any]:
    """The Megatron ShardedTensors behind one sharded_state_dict entry: itself, or what its factory
    splits it into."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    built = (
        list(nested_values({"": entry.build()}))
        if isinstance(entry, ShardedTensorFactory)
        else [entry]
    )
    pieces = [piece for piece in built if isinstance(piece, ShardedTensor)]
    for piece in pieces:
        # Only Megatron's own distributed optimizer flattens shards, and DeepSpeed is used in its
        # place.
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
