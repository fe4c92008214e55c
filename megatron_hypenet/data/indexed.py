"""Token files in Megatron's format (prefix.bin, prefix.idx): opening, and reading them as one
stream; token_writer.py writes them.

Megatron's own reader does not check the values of an index. The tokens themselves are memory-mapped
as one array, because training reads windows that cross documents.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_hypenet.data.pairs import mask_path, token_paths
from megatron_hypenet.errors import DataError
from megatron_hypenet.untrusted.files import FileKind, has_entry

INDEX_MAGIC = b"MMIDIDX\x00\x00"
"""First bytes of every .idx file (megatron/core/datasets/indexed_dataset.py)."""
INDEX_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version (1), code of the id type, number of sequences, number of document bounds. After
it: lengths of the sequences in tokens (int32), their first bytes in the .bin file (int64), and the
bounds of the documents, counted in sequences and starting with 0 (int64)."""
ID_TYPES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float64",
    7: "float32",
    8: "uint16",
}
_CHUNK = 1 << 20

_INDEX = FileKind(error=DataError, advice="run `hypenet data prepare` again")


@dataclass(frozen=True)
class TokenFile:
    """One opened pair."""

    prefix: Path
    tokens: npt.NDArray[np.integer]
    """All tokens, in document order [num_tokens], memory-mapped."""
    document_ends: npt.NDArray[np.int64]
    """Number of tokens up to and including each document [num_documents]."""
    mask: npt.NDArray[np.uint8] | None = None
    """Whether each token is to be predicted (1) or context (0) [num_tokens], memory-mapped;
    None when all are to be predicted."""

    def mask_of(self, start: int, stop: int) -> npt.NDArray[np.uint8] | None:
        """Return the mask of tokens start .. stop - 1."""
        return None if self.mask is None else self.mask[start:stop]

    def documents_before(self, fraction: float) -> int:
        """Return the tokens of the documents that are left when the last `fraction` of the text
        (whole documents, at least one) is taken off.

        One document alone cannot be split: then nothing is taken off.
        """
        if fraction <= 0 or len(self.document_ends) < 2:
            return len(self.tokens)
        keep = int(
            np.searchsorted(self.document_ends, (1 - fraction) * len(self.tokens), side="right")
        )
        return int(self.document_ends[min(max(keep, 1), len(self.document_ends) - 1) - 1])


def open_tokens(prefix: Path) -> TokenFile:
    """Open a pair. Raises DataError when a file is missing or is not Megatron's format, or when the
    two do not fit each other."""
    bin_path, idx_path = token_paths(prefix)
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise DataError(
                f"{path}: no such file; token files are .bin/.idx pairs, named by their prefix; "
                "`hypenet data prepare` makes them."
            )
    dtype, lengths, pointers, bounds = _read_index(idx_path)
    with _INDEX.open(bin_path) as stream:
        num_bytes = os.fstat(stream.fileno()).st_size
    total = _check_lengths(idx_path, lengths, pointers, dtype.itemsize)
    if total * dtype.itemsize != num_bytes:
        _INDEX.refuse(
            bin_path,
            f"{num_bytes} bytes, but the index counts {total} tokens of {dtype.itemsize} bytes; "
            "a write was interrupted or the two files belong to different texts",
        )
    if total == 0:
        raise DataError(f"{bin_path}: holds no tokens; the text it was made from is empty.")
    if bounds[0] != 0 or bounds[-1] != len(lengths) or (np.diff(bounds) < 0).any():
        _INDEX.refuse(
            idx_path,
            f"the bounds of its {len(bounds) - 1} documents do not ascend from 0 to its "
            f"{len(lengths)} sequences",
        )
    ends = np.append(pointers, num_bytes)[bounds[1:]] // dtype.itemsize
    return TokenFile(
        prefix, np.memmap(bin_path, dtype=dtype, mode="r"), ends, _open_mask(prefix, total)
    )


def _open_mask(prefix: Path, total: int) -> npt.NDArray[np.uint8] | None:
    """Return the mask of a pair with `total` tokens, None where there is none; DataError for one of
    another text."""
    path = mask_path(prefix)
    if not has_entry(path):
        return None
    with _INDEX.open(path) as stream:
        size = os.fstat(stream.fileno()).st_size
    if size != total:
        _INDEX.refuse(
            path,
            f"{size} bytes, but the pair has {total} tokens, and a mask has one byte for each; "
            "it belongs to another text",
        )
    return np.memmap(path, dtype=np.uint8, mode="r")


def _read_index(
    path: Path,
) -> tuple[np.dtype[Any], npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (id type, lengths, first bytes, document bounds) of an .idx file whose size is what
    its header says."""
    with _INDEX.open(path) as stream:
        head = stream.read(INDEX_HEADER.size)
        size = os.fstat(stream.fileno()).st_size
        if head[: len(INDEX_MAGIC)] != INDEX_MAGIC:
            _INDEX.refuse(path, "not a Megatron index")
        if len(head) < INDEX_HEADER.size:
            _INDEX.refuse(
                path, f"cut off in its header of {INDEX_HEADER.size} bytes: it has {size}"
            )
        _, version, code, num_sequences, num_bounds = INDEX_HEADER.unpack(head)
        if version != 1:
            _INDEX.refuse(path, f"a Megatron index of version {version}; version 1 is supported")
        if code not in ID_TYPES or ID_TYPES[code].startswith("float"):
            _INDEX.refuse(
                path,
                f"its ids are {ID_TYPES.get(code, f'of the unknown type {code}')}; "
                "token ids are integers",
            )
        needed = INDEX_HEADER.size + 12 * num_sequences + 8 * num_bounds
        if size != needed:
            _INDEX.refuse(
                path,
                f"damaged: {num_sequences} sequences and {num_bounds} document bounds take "
                f"{needed} bytes, it has {size}",
            )
        if num_bounds == 0:
            _INDEX.refuse(path, "damaged: it has no document bounds")
        lengths = (
            np.memmap(stream, np.int32, "r", INDEX_HEADER.size, (num_sequences,))
            if num_sequences
            else np.zeros(0, np.int32)
        )
        pointers = (
            np.memmap(
                stream, np.int64, "r", INDEX_HEADER.size + 4 * num_sequences, (num_sequences,)
            )
            if num_sequences
            else np.zeros(0, np.int64)
        )
        bounds = np.memmap(
            stream, np.int64, "r", INDEX_HEADER.size + 12 * num_sequences, (num_bounds,)
        )
    return np.dtype(ID_TYPES[code]), lengths, pointers, bounds


def _check_lengths(
    path: Path, lengths: npt.NDArray[np.int32], pointers: npt.NDArray[np.int64], item_bytes: int
) -> int:
    """Return the number of tokens of all sequences, which must follow each other without a gap; a
    part at a time, for large files."""
    total = 0
    for start in range(0, len(lengths), _CHUNK):
        part = lengths[start : start + _CHUNK].astype(np.int64)
        if (part < 0).any():
            first = start + int(np.argmax(part < 0))
            _INDEX.refuse(path, f"damaged: sequence {first} has the length {lengths[first]}")
        ends = total + np.cumsum(part)
        if not np.array_equal((ends - part) * item_bytes, pointers[start : start + _CHUNK]):
            _INDEX.refuse(
                path,
                f"damaged: the sequences from {start} on do not follow each other in the .bin file",
            )
        total = int(ends[-1])
    return total


class TokenStream:
    """Several parts of token files as one sequence of tokens, with len() and slices."""

    def __init__(
        self,
        parts: Iterable[npt.NDArray[np.integer]],
        document_ends: Iterable[npt.NDArray[np.int64] | None] = (),
        masks: Iterable[npt.NDArray[np.uint8] | None] = (),
    ) -> None:
        """Join the parts in order; empty ones are dropped.

        `document_ends` has, for each part, the tokens up to and including each of its documents;
        None, or no entry, for a part whose documents end with an end-of-document token. `masks` has
        which tokens are to be predicted; None, or no entry, for a part of which all are.
        """
        known = list(itertools.zip_longest(parts, document_ends, masks))
        self._parts = [part for part, _, _ in known if len(part)]
        self._document_ends = [ends for part, ends, _ in known if len(part)]
        self._masks = [mask for part, _, mask in known if len(part)]
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in self._parts])]).astype(
            np.int64
        )

    def __len__(self) -> int:
        """Return the number of tokens."""
        return int(self._starts[-1])

    @property
    def has_document_ends(self) -> bool:
        """Return whether `document_ends` was given for any part."""
        return any(ends is not None for ends in self._document_ends)

    @property
    def has_masks(self) -> bool:
        """Return whether a mask was given for any part."""
        return any(mask is not None for mask in self._masks)

    def last_tokens(
        self, start: int, stop: int
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Return two masks of the tokens start .. stop - 1, bool [stop - start]: whether a token is
        the last of its document by `document_ends`, and whether its part has such boundaries."""
        last = np.zeros(stop - start, dtype=np.bool_)
        known = np.zeros(stop - start, dtype=np.bool_)
        for number, first, stretch in self._overlaps(start, stop):
            ends = self._document_ends[number]
            if ends is not None:
                places = ends[slice(*np.searchsorted(ends, stretch, side="right"))]
                last[places + (first - start) - 1] = True
                known[first + stretch[0] - start : first + stretch[1] - start] = True
        return last, known

    def answers(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Return whether each token of start .. stop - 1 is to be predicted: bool [stop -
        start]."""
        found = np.ones(stop - start, dtype=np.bool_)
        for number, first, (begin, end) in self._overlaps(start, stop):
            if (mask := self._masks[number]) is not None:
                found[first + begin - start : first + end - start] = mask[begin:end] != 0
        return found

    def _overlaps(self, start: int, stop: int) -> Iterator[tuple[int, int, tuple[int, int]]]:
        """Yield (number, first token, [begin, end) inside of it) of each part that has tokens of
        start .. stop - 1."""
        number = max(0, int(np.searchsorted(self._starts, start, side="right")) - 1)
        for index in range(number, len(self._parts)):
            first = int(self._starts[index])
            if first >= stop:
                return
            yield index, first, (max(start - first, 0), min(stop - first, len(self._parts[index])))

    def __getitem__(self, where: slice) -> npt.NDArray[np.int64]:
        """Return the tokens of a slice without step, int64."""
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError("a token stream has no stepped slices")
        pieces = [
            np.asarray(self._parts[number][begin:end], dtype=np.int64)
            for number, _, (begin, end) in self._overlaps(start, stop)
        ]
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)


def check_mask(prefix: Path, first: int, part: npt.NDArray[np.uint8]) -> None:
    """Raise DataError unless a part of a pair's mask, from byte `first` on, holds 0 and 1 only."""
    if part.size and (largest := int(part.max())) > 1:
        place = first + int(np.argmax(part > 1))
        raise DataError(
            f"{mask_path(prefix)}: byte {place:,} is {largest}; a mask holds 0 and 1, and this one "
            "is damaged. Run `hypenet data prepare` again"
        )
