"""Read `.metadata` of a sharded folder: its tensors, their pieces, and the place of each piece.

torch writes the file as a pickle of its Metadata class. It is read as inert values and checked
here, entry by entry, against the files: every piece lies inside its tensor, the pieces tile the
tensor, and every piece's bytes are there. So nothing that a reader allocates is larger than the
files.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_hypenet.checkpoint.format import TENSORS_SUFFIX
from megatron_hypenet.checkpoint.safety import PICKLE, read_plain
from megatron_hypenet.untrusted.files import inside, shown
from megatron_hypenet.untrusted.pickles import Global, Pairs, Record

METADATA = ".metadata"
"""Name of the file that lists the tensors of a sharded folder and the places of their pieces."""

_MODULE = "torch.distributed.checkpoint.metadata"
_SIZE = Global("torch", "Size")
_MAX_DIMENSIONS = 16
_MAX_COUNT = 1 << 60
_MAX_COMPARISONS = 20_000_000
"""Number of pairs of pieces that are compared for an overlap: some seconds of work."""

Extents = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """One stored piece of a tensor: its place in the tensor, and its bytes in a file."""

    offset: Extents
    shape: Extents
    file: Path
    start: int
    length: int
    stored_shape: Extents | None = None
    """Shape with which its bytes were saved, where that begins with an axis of one more."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object of a sharded folder that is no tensor: the bytes of a file that torch.save
    wrote."""

    file: Path
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a sharded folder."""

    shape: Extents
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a sharded folder by name. CheckpointError names what is damaged,
    missing or inconsistent."""
    return read_contents(folder)[0]


def read_contents(
    folder: Path, wanted: Callable[[str], bool] = lambda name: True
) -> tuple[dict[str, StoredTensor], dict[str, StoredObject]]:
    """Return the tensors of a sharded folder whose names are `wanted`, and its objects, by name;
    see `read_index`. What is not wanted is not checked."""
    return _Index(folder).contents(wanted)


class _Index:
    """The file while it is read; every message names it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / METADATA
        self.comparisons = 0
        self.sizes: dict[str, int] = {}

    def refuse(self, reason: str) -> Any:
        PICKLE.refuse(self.path, reason)

    def contents(
        self, wanted: Callable[[str], bool]
    ) -> tuple[dict[str, StoredTensor], dict[str, StoredObject]]:
        root = self.attributes(
            read_plain(self.path, PICKLE.read_bytes(self.path)),
            "Metadata",
            ("state_dict_metadata", "storage_data"),
        )
        places = self.places(root["storage_data"])
        found: dict[str, StoredTensor] = {}
        objects: dict[str, StoredObject] = {}
        for name, entry in self.pairs(root["state_dict_metadata"], "state_dict_metadata"):
            if not isinstance(name, str) or name in found or name in objects:
                self.refuse(
                    "a tensor's name is "
                    f"{shown(repr(name), 80) if isinstance(name, str) else 'no text'}, "
                    "or is there twice"
                )
            if isinstance(entry, Record) and entry.what == Global(_MODULE, "BytesStorageMetadata"):
                if (name, ()) in places:
                    file, start, length = places[name, ()]
                    objects[name] = StoredObject(self.folder / file, start, length)
                continue
            if not wanted(name):
                continue
            found[name] = self.tensor(name, entry, places)
        self.check_places([piece for tensor in found.values() for piece in tensor.pieces])
        return found, objects

    def tensor(
        self, name: str, entry: Any, places: dict[tuple[str, Extents], tuple[str, int, int]]
    ) -> StoredTensor:
        values = self.attributes(entry, "TensorStorageMetadata", ("properties", "size", "chunks"))
        shape, dtype = self.extents(values["size"], name), self.dtype(values["properties"], name)
        if not isinstance(values["chunks"], list):
            self.refuse(f"{shown(name)} has no list of pieces")
        pieces = [self.piece(name, chunk, dtype, places) for chunk in values["chunks"]]
        for piece in pieces:
            if len(piece.offset) != len(shape) or any(
                o + n > s for o, n, s in zip(piece.offset, piece.shape, shape, strict=True)
            ):
                self.refuse(
                    f"a piece of {shown(name)}, {list(piece.shape)} at {list(piece.offset)}, "
                    f"is not inside its shape {list(shape)}"
                )
        if sum(math.prod(piece.shape) for piece in pieces) != math.prod(shape) or self.overlap(
            pieces
        ):
            self.refuse(
                f"the stored pieces of {shown(name)} do not cover its shape {list(shape)} exactly "
                "once"
            )
        return StoredTensor(shape, dtype, tuple(pieces))

    def piece(
        self,
        name: str,
        chunk: Any,
        dtype: torch.dtype,
        places: dict[tuple[str, Extents], tuple[str, int, int]],
    ) -> Piece:
        values = self.attributes(chunk, "ChunkStorageMetadata", ("offsets", "sizes"))
        offset, shape = self.extents(values["offsets"], name), self.extents(values["sizes"], name)
        if len(offset) != len(shape):
            self.refuse(
                f"a piece of {shown(name)} has {len(shape)} dimensions and an offset of "
                f"{len(offset)}"
            )
        if (name, offset) not in places:
            self.refuse(f"it does not say where the piece of {shown(name)} at {list(offset)} lies")
        file, start, length = places[name, offset]
        if math.prod(shape) * dtype.itemsize > length:
            self.refuse(
                f"the piece of {shown(name)} at {list(offset)} is {list(shape)} {dtype}, "
                f"but has only {length:,} bytes"
            )
        return Piece(offset, shape, self.folder / file, start, length)

    def places(self, value: Any) -> dict[tuple[str, Extents], tuple[str, int, int]]:
        """Return the place of every piece: (tensor, offset in it) -> (file, first byte, number of
        bytes)."""
        found: dict[tuple[str, Extents], tuple[str, int, int]] = {}
        for index, info in self.pairs(value, "storage_data"):
            key = self.attributes(index, "MetadataIndex", ("fqn",))
            name = key["fqn"]
            offset = key.get("offset")
            if not isinstance(name, str):
                self.refuse("an entry of storage_data belongs to no tensor")
            where = self.attributes(
                info,
                "_StorageInfo",
                ("relative_path", "offset", "length"),
                "torch.distributed.checkpoint.filesystem",
            )
            file, start, length = where["relative_path"], where["offset"], where["length"]
            if where.get("transform_descriptors"):
                self.refuse(
                    f"{shown(name)} is stored compressed or transformed, which is not supported"
                )
            self.check_place(name, file, start, length)
            identity = (name, () if offset is None else self.extents(offset, name))
            if identity in found:
                self.refuse(f"the piece of {shown(name)} at {list(identity[1])} is there twice")
            found[identity] = (file, start, length)
        return found

    def check_place(self, name: str, file: Any, start: Any, length: Any) -> None:
        if not isinstance(file, str) or Path(file).name != file:
            self.refuse(
                "points outside its folder "
                f"({shown(repr(file), 80) if isinstance(file, str) else 'no text'}); "
                "nothing was loaded"
            )
        if not file.endswith(TENSORS_SUFFIX):
            self.refuse(
                f"{shown(name)} lies in {shown(repr(file), 80)}, but files with tensors end in "
                f"{TENSORS_SUFFIX}"
            )
        if file not in self.sizes:
            path = inside(self.folder, file, PICKLE)
            with PICKLE.open(path) as stream:
                self.sizes[file] = os.fstat(stream.fileno()).st_size
        if (
            type(start) is not int
            or type(length) is not int
            or not (0 <= start and 0 < length and start + length <= self.sizes[file])
        ):
            self.refuse(
                f"{shown(name)} lies at bytes that {file} ({self.sizes[file]:,} bytes) does not "
                "have"
            )

    def check_places(self, pieces: Sequence[Piece]) -> None:
        """Refuse two pieces that share bytes: one of them is damaged."""
        ordered = sorted(pieces, key=lambda piece: (piece.file, piece.start))
        for one, other in zip(ordered, ordered[1:], strict=False):
            if one.file == other.file and one.start + one.length > other.start:
                self.refuse(f"two pieces share byte {other.start:,} of {other.file.name}")

    def overlap(self, pieces: Sequence[Piece]) -> bool:
        """Return whether two of these pieces of one tensor share a value. They are swept along the
        axis on which most of them begin apart."""
        pieces = [piece for piece in pieces if math.prod(piece.shape)]
        if len(pieces) < 2:
            return False
        if not pieces[0].offset:
            return True
        axis = max(
            range(len(pieces[0].offset)),
            key=lambda axis: len({piece.offset[axis] for piece in pieces}),
        )
        active: list[Piece] = []
        for piece in sorted(pieces, key=lambda piece: piece.offset[axis]):
            active = [
                other
                for other in active
                if other.offset[axis] + other.shape[axis] > piece.offset[axis]
            ]
            self.comparisons += len(active)
            if self.comparisons > _MAX_COMPARISONS:
                self.refuse("its tensors are cut into more pieces than can be checked")
            if any(
                intersection(piece.offset, piece.shape, other.offset, other.shape) is not None
                for other in active
            ):
                return True
            active.append(piece)
        return False

    def attributes(
        self, value: Any, name: str, needed: tuple[str, ...], module: str = _MODULE
    ) -> dict[str, Any]:
        """Return the attributes of an object of torch's class `name`, as texts to values."""
        if not isinstance(value, Record) or value.what != Global(module, name):
            self.refuse(f"expected an object of the class {name}")
        pairs = self.pairs(value.state, name)
        found = {key: entry for key, entry in pairs if isinstance(key, str)}
        if len(found) != len(pairs):
            self.refuse(f"an attribute of {name} is there twice, or has no name")
        for attribute in needed:
            if attribute not in found:
                self.refuse(f"an object of the class {name} has no {attribute}")
        return found

    def pairs(self, value: Any, what: str) -> list[tuple[Any, Any]]:
        if not isinstance(value, Pairs):
            self.refuse(f"{what} is no dictionary")
        items: list[tuple[Any, Any]] = value.items
        return items

    def extents(self, value: Any, name: str) -> Extents:
        """Return a torch.Size, or the tuple or list that older versions of torch wrote for one."""
        if isinstance(value, Record) and value.what == _SIZE and len(value.args) == 1:
            value = value.args[0]
        if not isinstance(value, tuple | list) or len(value) > _MAX_DIMENSIONS:
            self.refuse(
                f"a shape or an offset of {shown(name)} is no torch.Size of at most "
                f"{_MAX_DIMENSIONS} dimensions"
            )
        if (
            not all(type(number) is int and 0 <= number for number in value)
            or math.prod(max(1, n) for n in value) > _MAX_COUNT
        ):
            self.refuse(
                f"a shape or an offset of {shown(name)} is negative, too large or no whole number"
            )
        return tuple(value)

    def dtype(self, properties: Any, name: str) -> torch.dtype:
        """Return the dtype of a TensorProperties, whose state is a tuple that begins with it."""
        state = (
            properties.state
            if isinstance(properties, Record)
            and properties.what == Global(_MODULE, "TensorProperties")
            else None
        )
        found = state[0] if isinstance(state, tuple) and state else None
        dtype = (
            getattr(torch, found.name, None)
            if isinstance(found, Global) and found.module == "torch"
            else None
        )
        if not isinstance(dtype, torch.dtype):
            self.refuse(f"the dtype of {shown(name)} is missing")
        assert isinstance(dtype, torch.dtype)
        return dtype


def intersection(
    offset: Extents, shape: Extents, other_offset: Extents, other_shape: Extents
) -> tuple[Extents, Extents] | None:
    """Return (offset, shape) of what two boxes have in common; None when they share no value."""
    start = tuple(map(max, offset, other_offset))
    stop = tuple(
        min(o + n, p + m)
        for o, n, p, m in zip(offset, shape, other_offset, other_shape, strict=True)
    )
    if any(a >= b for a, b in zip(start, stop, strict=True)):
        return None
    return start, tuple(b - a for a, b in zip(start, stop, strict=True))


def overlaps(
    tensor: StoredTensor, offset: Extents, shape: Extents
) -> Iterator[tuple[Piece, Extents, Extents]]:
    """Yield (piece, offset, shape) of what each stored piece has of the box of `shape` at `offset`,
    in the tensor's coordinates."""
    for piece in tensor.pieces:
        common = intersection(offset, shape, piece.offset, piece.shape)
        if common is not None:
            yield piece, *common
