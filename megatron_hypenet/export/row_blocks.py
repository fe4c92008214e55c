"""Tensors that are put together from rows of other tensors, produced from any place on: a
conversion that interleaves, splits or pads rows never holds a whole tensor."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from megatron_hypenet.checkpoint.shards import ShardReader, StreamedTensor
from megatron_hypenet.errors import ConversionError
from megatron_hypenet.export.tensors import SCRATCH, blocks_of, check_finite


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of the tensor `source`, from row `first` on; zeros where `source` is
    None."""

    source: str | None
    first: int
    rows: int


@dataclass(frozen=True, slots=True)
class Assembled:
    """A tensor and the blocks of rows that it consists of, in order."""

    name: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]

    @property
    def sources(self) -> list[str]:
        """Return the names of the tensors whose rows it has."""
        return list(dict.fromkeys(b.source for b in self.blocks if b.source is not None))

    def dtype(self, reader: ShardReader) -> torch.dtype:
        """Return the stored dtype of its sources; ConversionError when they have several."""
        dtypes = {reader.dtype(source) for source in self.sources}
        if len(dtypes) != 1:
            raise ConversionError(
                f"{reader.folder}: {' and '.join(self.sources)} become one tensor but are stored "
                f"as {', '.join(sorted(map(str, dtypes)))}; choose one with --dtype"
            )
        return dtypes.pop()


def inverted(tensors: list[Assembled], shapes: dict[str, tuple[int, ...]]) -> list[Assembled]:
    """Return the sources of `tensors`, which have these shapes, as tensors that consist of rows of
    `tensors`."""
    found: dict[str, list[tuple[int, Block]]] = {name: [] for name in shapes}
    for tensor in tensors:
        row = 0
        for block in tensor.blocks:
            if block.source is not None:
                found[block.source].append((block.first, Block(tensor.name, row, block.rows)))
            row += block.rows
    return [
        Assembled(
            name,
            shapes[name],
            tuple(block for _, block in sorted(blocks, key=lambda entry: entry[0])),
        )
        for name, blocks in found.items()
    ]


def streamed(
    reader: ShardReader, tensor: Assembled, dtype: torch.dtype, *, leading: tuple[int, ...] = ()
) -> StreamedTensor:
    """Return the tensor in `dtype`, read from `reader`, with axes of length 1 in front as `leading`
    says; a value that is not finite, before or after the cast, is a ConversionError."""
    width = math.prod(tensor.shape[1:])
    ends = list(accumulate(block.rows for block in tensor.blocks))

    def read(first: int, target: Tensor) -> None:
        done = 0
        while done < target.numel():
            row = (first + done) // width
            at = bisect_right(ends, row)
            block = tensor.blocks[at]
            count = min((ends[at] - row) * width, target.numel() - done)
            part = target[done : done + count]
            if block.source is None:
                part.zero_()
            else:
                start = block.first + row - (ends[at] - block.rows)
                _read(reader, block.source, start * width, part)
            done += count

    return StreamedTensor((*leading, *tensor.shape), dtype, width, read)


def _read(reader: ShardReader, name: str, first: int, target: Tensor) -> None:
    """Fill `target` with values of a stored tensor from number `first` on, cast to its dtype."""
    stored = reader.dtype(name)
    count = math.prod(reader.shape(name))
    plain = stored == target.dtype
    values = target if plain else SCRATCH[0].take(target.numel(), stored)

    def read(first: int, block: Tensor) -> None:
        reader.read_values(name, first, block)

    def blocks() -> Iterator[Tensor]:
        return blocks_of(read, count, stored, reader.unit(name))

    read(first, values)
    where = str(reader.folder)
    check_finite(name, values, blocks, where=where)
    if not plain:
        target.copy_(values)
        check_finite(
            f"{name} as {target.dtype}",
            target,
            lambda: (block.to(target.dtype) for block in blocks()),
            where=where,
        )
