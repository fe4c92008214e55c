"""Token files in Megatron's format (prefix.bin, prefix.idx): writing, opening, and reading them as
one stream.

Megatron-core writes the index. It is read here, because Megatron's reader does not check its
values; the tokens themselves are memory-mapped as one array, because training reads windows that
cross documents. Megatron is imported where it is used, because its import takes seconds and looks
for a GPU.
"""

from __future__ import annotations

import itertools
import os
import struct
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from megatron_hypenet.atomic_files import temporary_beside
from megatron_hypenet.errors import DataError, SetupError, is_disk_full
from megatron_hypenet.untrusted.files import FileKind

_INDEX_MAGIC = b"MMIDIDX\x00\x00"
"""First bytes of every .idx file (megatron/core/datasets/indexed_dataset.py)."""
_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version (1), code of the id type, number of sequences, number of document bounds. After
it: lengths of the sequences in tokens (int32), their first bytes in the .bin file (int64), and the
bounds of the documents, counted in sequences and starting with 0 (int64)."""
_ID_TYPES = {
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


def _megatron() -> Any:
    with warnings.catch_warnings():
        # Megatron warns about optional GPU libraries that token files do not need
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def token_paths(prefix: Path) -> tuple[Path, Path]:
    """(prefix.bin, prefix.idx)."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def is_token_file(prefix: Path) -> bool:
    """Whether both files of the pair exist."""
    return all(path.is_file() for path in token_paths(prefix))


class TokenFileWriter:
    """Writes one pair under a temporary name and moves it into place on a clean exit of the `with`
    block, index last."""

    def __init__(
        self, prefix: Path, *, vocab_size: int | None = None, dtype: npt.DTypeLike | None = None
    ) -> None:
        """Ids are stored as `dtype`, or as Megatron chooses for `vocab_size`: uint16 below 65,500
        entries, else int32."""
        self.prefix = prefix
        self.num_documents = self.num_tokens = 0
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._partial = temporary_beside(prefix)
        indexed = _megatron()
        id_type = indexed.DType.optimal_dtype(vocab_size) if dtype is None else np.dtype(dtype).type
        self._builder = indexed.IndexedDatasetBuilder(str(token_paths(self._partial)[0]), id_type)

    def add(self, ids: Sequence[int]) -> None:
        """Append one document."""
        import torch

        self._builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)])
        self.num_documents += 1
        self.num_tokens += len(ids)

    def add_file(self, other: TokenFile) -> None:
        """Append all documents of another pair (Megatron requires the same id type)."""
        self._builder.add_index(str(other.prefix))
        self.num_documents += len(other.document_ends)
        self.num_tokens += len(other.tokens)

    def __enter__(self) -> Self:
        """Return the writer; its constructor has opened the files."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Commit the pair, or remove what was written when the block failed."""
        parts = token_paths(self._partial)
        try:
            self._builder.finalize(str(parts[1]))
            if kind is None:
                for part, final in zip(parts, token_paths(self.prefix), strict=True):
                    part.replace(final)
        except OSError as error:
            fault = fault or error
        finally:
            for part in parts:
                part.unlink(missing_ok=True)
        if is_disk_full(fault):
            raise SetupError(
                f"{self.prefix}: no space left on the disk; nothing was left there. "
                "Free space or choose another place"
            ) from fault
        if kind is None and fault is not None:
            raise fault


@dataclass(frozen=True)
class TokenFile:
    """One opened pair."""

    prefix: Path
    tokens: npt.NDArray[np.integer]
    """All tokens, in document order [num_tokens], memory-mapped."""
    document_ends: npt.NDArray[np.int64]
    """Number of tokens up to and including each document [num_documents]."""

    def documents_before(self, fraction: float) -> int:
        """Tokens of the documents that are left when the last `fraction` of the text (whole
        documents, at least one) is taken off.

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
    return TokenFile(prefix, np.memmap(bin_path, dtype=dtype, mode="r"), ends)


def _read_index(
    path: Path,
) -> tuple[np.dtype[Any], npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (id type, lengths, first bytes, document bounds) of an .idx file whose size is what
    its header says."""
    with _INDEX.open(path) as stream:
        head = stream.read(_HEADER.size)
        size = os.fstat(stream.fileno()).st_size
        if head[: len(_INDEX_MAGIC)] != _INDEX_MAGIC:
            _INDEX.refuse(path, "not a Megatron index")
        if len(head) < _HEADER.size:
            _INDEX.refuse(path, f"cut off in its header of {_HEADER.size} bytes: it has {size}")
        _, version, code, num_sequences, num_bounds = _HEADER.unpack(head)
        if version != 1:
            _INDEX.refuse(path, f"a Megatron index of version {version}; version 1 is supported")
        if code not in _ID_TYPES or _ID_TYPES[code].startswith("float"):
            _INDEX.refuse(
                path,
                f"its ids are {_ID_TYPES.get(code, f'of the unknown type {code}')}; "
                "token ids are integers",
            )
        needed = _HEADER.size + 12 * num_sequences + 8 * num_bounds
        if size != needed:
            _INDEX.refuse(
                path,
                f"damaged: {num_sequences} sequences and {num_bounds} document bounds take "
                f"{needed} bytes, it has {size}",
            )
        if num_bounds == 0:
            _INDEX.refuse(path, "damaged: it has no document bounds")
        lengths = (
            np.memmap(stream, np.int32, "r", _HEADER.size, (num_sequences,))
            if num_sequences
            else np.zeros(0, np.int32)
        )
        pointers = (
            np.memmap(stream, np.int64, "r", _HEADER.size + 4 * num_sequences, (num_sequences,))
            if num_sequences
            else np.zeros(0, np.int64)
        )
        bounds = np.memmap(stream, np.int64, "r", _HEADER.size + 12 * num_sequences, (num_bounds,))
    return np.dtype(_ID_TYPES[code]), lengths, pointers, bounds


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
    ) -> None:
        """Parts are joined in order; empty ones are dropped.

        `document_ends` has, for each part, the tokens up to and including each of its documents;
        None, or no entry, for a part whose documents end with an end-of-document token.
        """
        known = list(itertools.zip_longest(parts, document_ends))
        self._parts = [part for part, _ in known if len(part)]
        self._document_ends = [ends for part, ends in known if len(part)]
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in self._parts])]).astype(
            np.int64
        )

    def __len__(self) -> int:
        """Number of tokens."""
        return int(self._starts[-1])

    @property
    def has_document_ends(self) -> bool:
        """Whether `document_ends` was given for any part."""
        return any(ends is not None for ends in self._document_ends)

    def last_tokens(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Return, for each token of start .. stop - 1, whether it is the last of its document: bool
        [stop - start]."""
        last = np.zeros(stop - start, dtype=np.bool_)
        for first, part, ends in zip(self._starts, self._parts, self._document_ends, strict=False):
            if ends is None or first >= stop or first + len(part) <= start:
                continue
            stretch = (start - first, min(stop - first, len(part)))
            places = ends[slice(*np.searchsorted(ends, stretch, side="right"))]
            last[places + (first - start) - 1] = True
        return last

    def __getitem__(self, where: slice) -> npt.NDArray[np.int64]:
        """Tokens of a slice without step, int64."""
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError("a token stream has no stepped slices")
        pieces = []
        part = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self._starts[part + 1]))
            pieces.append(
                np.asarray(
                    self._parts[part][start - self._starts[part] : end - self._starts[part]],
                    dtype=np.int64,
                )
            )
            start = end
            part = part + 1
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
