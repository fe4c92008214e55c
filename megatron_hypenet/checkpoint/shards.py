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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_hypenet.checkpoint.safety import PICKLE, check_common
from megatron_hypenet.checkpoint.shard_index import (
    METADATA,
    Piece,
    StoredTensor,
    overlaps,
    read_index,
)
from megatron_hypenet.checkpoint.stored_tensor import (
    Located,
    locate_tensor,
    read_values,
    read_whole,
)
from megatron_hypenet.errors import CheckpointError
from megatron_hypenet.untrusted.files import has_entry

_BLOCK_BYTES = 8 << 20
"""Rows of a stored piece are read in blocks of about this size."""


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is produced only while it is written, so that a converter never holds a whole
    model."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class StreamedTensor:
    """A tensor whose values can be produced from any place on, so that a converter never holds a
    whole one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    unit: int
    """Values are asked for in multiples of this number, and from multiples of it on."""
    read: Callable[[int, Tensor], None]
    """Called with the number of the first value, and the contiguous 1-D tensor of this dtype to
    fill; from several threads."""

    @property
    def num_values(self) -> int:
        """Return the number of values."""
        return math.prod(self.shape)

    def whole(self) -> Tensor:
        """Return all values, in memory."""
        values = torch.empty(self.num_values, dtype=self.dtype)
        self.read(0, values)
        return values.view(self.shape)

    def fill(self, first_byte: int, target: memoryview) -> None:
        """Fill `target` with the bytes of the values from byte `first_byte` on."""
        values = torch.frombuffer(target, dtype=self.dtype)
        self.read(first_byte // self.dtype.itemsize, values)


@dataclass(frozen=True, slots=True)
class Shard:
    """One local piece of the global tensor `key`: `data` lies at `offset` inside `global_shape`."""

    key: str
    data: Tensor | LazyTensor | StreamedTensor
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]

    @classmethod
    def whole(cls, key: str, data: Tensor | LazyTensor | StreamedTensor) -> Shard:
        """Return the shard that is the whole tensor."""
        return cls(key, data, tuple(data.shape), (0,) * len(data.shape))


class ShardReader(Mapping[str, Tensor]):
    """The tensors of one sharded folder by global name; each access reads that tensor whole, on the
    CPU, in its stored dtype."""

    def __init__(
        self, folder: Path | str, tensors: Mapping[str, StoredTensor] | None = None
    ) -> None:
        """Read the folder's index; or take its `tensors`, where the caller has read it."""
        self.folder = Path(folder)
        self._places: dict[tuple[Path, int], Located] = {}
        if tensors is not None:
            self._tensors = dict(tensors)
            return
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
        """Return the global shape of one tensor, without reading it."""
        return self._tensors[key].shape

    def dtype(self, key: str) -> torch.dtype:
        """Return the stored dtype of one tensor, without reading it."""
        return self._tensors[key].dtype

    def pieces(self, key: str) -> int:
        """Return the number of pieces in which one tensor is stored, which depends on its writer's
        layout."""
        return len(self._tensors[key].pieces)

    def __getitem__(self, key: str) -> Tensor:
        whole = torch.empty(self.shape(key), dtype=self.dtype(key))
        self.read_into([(key, (0,) * whole.dim(), whole)])
        return whole

    def read_into(self, requests: Iterable[tuple[str, Sequence[int], Tensor]]) -> None:
        """Fill each target tensor with the part of `key` that starts at the given global offset,
        casting to the target's dtype. Of a stored piece only the rows that are asked for are read,
        in blocks.

        CheckpointError when a stored piece cannot be read, or is not what the folder's index says.
        """
        with self._files() as streams:
            for key, start, target in requests:
                stored = self._tensors[key]
                origin = tuple(start)
                filled = 0
                for piece, offset, shape in overlaps(stored, origin, tuple(target.shape)):
                    wanted = _part(target, offset, origin, shape)
                    for at, rows in self._rows(piece, stored, streams, offset, shape):
                        inner = (at, *offset[1:]) if offset else ()
                        part = (rows.shape[0], *shape[1:]) if offset else ()
                        _part(wanted, inner, offset, part).copy_(
                            _part(rows, inner, (at, *piece.offset[1:]) if offset else (), part)
                        )
                    filled += math.prod(shape)
                if filled != target.numel():
                    PICKLE.refuse(
                        self.folder,
                        f"the stored pieces of {key} do not cover {list(target.shape)} at "
                        f"{list(origin)}",
                    )

    def unit(self, key: str) -> int:
        """Return the number of values that `read_values` reads of `key` at least: 1 where values
        lie one behind the other in the files, else those of one row."""
        stored = self._tensors[key]
        whole_rows = all(piece.shape[1:] == stored.shape[1:] for piece in stored.pieces)
        with self._files() as streams:
            plain = all(self._located(p, stored, streams).contiguous for p in stored.pieces)
        return 1 if whole_rows and plain else max(1, math.prod(stored.shape[1:]))

    def read_values(self, key: str, first: int, target: Tensor) -> None:
        """Fill the contiguous 1-D `target` with the values of `key` from number `first` on, in the
        order of the whole tensor, casting to the target's dtype. `first` and the number of values
        are multiples of `unit(key)`; several threads may call it."""
        stored = self._tensors[key]
        if self.unit(key) == 1 and target.dtype == stored.dtype:
            with self._files() as streams:
                self._read_plain(stored, streams, first, target)
            return
        row = max(1, math.prod(stored.shape[1:]))
        start = first // row
        stop = -(-(first + target.numel()) // row)
        rows = target
        if (first, target.numel()) != (start * row, (stop - start) * row):
            rows = target.new_empty((stop - start) * row)
        shape = (stop - start, *stored.shape[1:]) if stored.shape else ()
        origin = (start, *(0 for _ in stored.shape[1:])) if stored.shape else ()
        self.read_into([(key, origin, rows.view(shape))])
        if rows is not target:
            target.copy_(rows[first - start * row :][: target.numel()])

    def _read_plain(
        self, stored: StoredTensor, streams: _Files, first: int, target: Tensor
    ) -> None:
        """Read like `read_values` a tensor whose pieces are whole rows, one behind the other."""
        row = math.prod(stored.shape[1:])
        last = first + target.numel()
        for piece in stored.pieces:
            begin = piece.offset[0] * row if piece.offset else 0
            low = max(first, begin)
            high = min(last, begin + math.prod(piece.shape))
            if low < high:
                place = self._located(piece, stored, streams)
                part = target[low - first : high - first]
                read_values(
                    piece.file, streams[piece.file], place, low - begin, part, past_cache=True
                )

    def _rows(
        self,
        piece: Piece,
        stored: StoredTensor,
        streams: _Files,
        offset: Sequence[int],
        shape: Sequence[int],
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row in the whole tensor, rows) of the piece, for the rows of `shape` at
        `offset` in blocks; a piece that is no rows of contiguous values comes whole."""
        place = self._located(piece, stored, streams)
        stream = streams[piece.file]
        if not shape or not place.contiguous:
            whole = read_whole(piece.file, stream, place, piece.shape, stored.dtype)
            first = offset[0] - piece.offset[0] if shape else 0
            yield (
                (offset[0] if shape else 0),
                (whole.narrow(0, first, shape[0]) if shape else whole),
            )
            return
        row = math.prod(piece.shape[1:])
        step = max(1, _BLOCK_BYTES // max(1, row * stored.dtype.itemsize))
        block = torch.empty((min(step, shape[0]), *piece.shape[1:]), dtype=stored.dtype)
        for at in range(offset[0], offset[0] + shape[0], step):
            rows = block[: min(step, offset[0] + shape[0] - at)]
            read_values(piece.file, stream, place, (at - piece.offset[0]) * row, rows)
            yield at, rows

    def _located(self, piece: Piece, stored: StoredTensor, streams: _Files) -> Located:
        found = self._places.get((piece.file, piece.start))
        if found is None:
            found = locate_tensor(
                piece.file,
                streams[piece.file],
                piece.start,
                piece.length,
                shape=piece.stored_shape or piece.shape,
                dtype=stored.dtype,
            )
            found = replace(found, stride=found.stride[len(found.stride) - len(piece.shape) :])
            self._places[piece.file, piece.start] = found
        return found

    @contextlib.contextmanager
    def _files(self) -> Iterator[_Files]:
        with contextlib.ExitStack() as stack:
            yield _Files(stack)


class _Files(dict[Path, BinaryIO]):
    """Files by path, opened when they are asked for."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        super().__init__()
        self._stack = stack

    def __missing__(self, path: Path) -> BinaryIO:
        self[path] = self._stack.enter_context(PICKLE.open(path))
        return self[path]


def _part(
    tensor: Tensor, offset: Sequence[int], origin: Sequence[int], shape: Sequence[int]
) -> Tensor:
    """Return the view of `shape` at the global `offset` of a tensor that itself lies at
    `origin`."""
    for axis, (start, length) in enumerate(zip(offset, shape, strict=True)):
        tensor = tensor.narrow(axis, start - origin[axis], length)
    return tensor


def tensor_pieces(entry: Any) -> list[Any]:
    """Return the Megatron ShardedTensors behind one sharded_state_dict entry: itself, or what its
    factory splits it into."""
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
    """Return whether this process is the one that writes this piece (replica index 0 on every
    axis)."""
    replica = piece.replica_id
    return all(index == 0 for index in replica) if isinstance(replica, tuple) else replica == 0


def piece_shard(piece: Any) -> Shard:
    """Return a Megatron ShardedTensor with data as a Shard, with its prepended axes written out."""
    data = piece.data.view((1,) * piece.prepend_axis_num + tuple(piece.local_shape))
    return Shard(piece.key, data, tuple(piece.global_shape), tuple(piece.global_offset))
