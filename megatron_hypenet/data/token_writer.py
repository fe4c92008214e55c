"""Write token files in Megatron's format (prefix.bin, prefix.idx), and beside them prefix.mask for
text of which only a part is trained on.

The three files of a pair:

    prefix.bin   all ids, documents one after the other
    prefix.idx   Megatron's index: the length of every document (data/indexed.py has the layout)
    prefix.mask  optional, one byte per id: 1 where the id is to be predicted, 0 where it is context

They are made in a folder beside the prefix and moved into place at the end, index last. The bytes
are those that megatron-core's IndexedDatasetBuilder writes (a test compares them); it is not used,
because it takes a tensor and several calls per document, and cannot go on with a file that it began
earlier.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from megatron_hypenet.atomic_files import temporary_beside
from megatron_hypenet.data.indexed import ID_TYPES, INDEX_HEADER, INDEX_MAGIC, TokenFile, check_mask
from megatron_hypenet.data.pairs import mask_path, token_paths
from megatron_hypenet.errors import DataError, SetupError, is_disk_full

WIDE_VOCABULARY = 65_500
"""Vocabularies from this size on are stored as int32, smaller ones as uint16
(DType.optimal_dtype of megatron/core/datasets/indexed_dataset.py)."""
_CHUNK = 1 << 20
_MOST_TOKENS = 2**31 - 1
"""Longest document that an index can hold: lengths are int32."""


def id_type(vocab_size: int) -> np.dtype[np.integer]:
    """Return the type in which ids of a vocabulary of this size are stored."""
    return np.dtype(np.uint16 if vocab_size < WIDE_VOCABULARY else np.int32)


class TokenFolder:
    """The unfinished files of one pair, in a folder of their own: `tokens`, `lengths` (int32) and
    `mask`. Whoever notes `sizes` can cut them back to that state and go on."""

    def __init__(self, folder: Path, dtype: npt.DTypeLike, *, masked: bool) -> None:
        """Open the files in `folder` for appending; they are created if they are missing."""
        self.folder = folder
        self.dtype = np.dtype(dtype)
        self.masked = masked
        folder.mkdir(parents=True, exist_ok=True)
        names = ("tokens", "lengths", *(("mask",) if masked else ()))
        self._files: dict[str, BinaryIO] = {name: (folder / name).open("ab") for name in names}

    def add(
        self, ids: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer],
        mask: npt.NDArray[np.uint8] | None = None,
    ) -> None:  # fmt: skip
        """Append documents: their ids one after the other, and the number of ids of each. `mask`
        has a byte per id; without it, all ids of a masked pair count."""
        if len(lengths) and int(lengths.max()) > _MOST_TOKENS:
            raise DataError(
                f"a document of {int(lengths.max()):,} tokens; a token file holds documents of up "
                f"to {_MOST_TOKENS:,}: split it"
            )
        self._files["tokens"].write(np.ascontiguousarray(ids, dtype=self.dtype).data)
        self._files["lengths"].write(np.ascontiguousarray(lengths, dtype=np.int32).data)
        if self.masked:
            counted = np.ones(len(ids), np.uint8) if mask is None else mask
            self._files["mask"].write(np.ascontiguousarray(counted, dtype=np.uint8).data)

    def sizes(self) -> dict[str, int]:
        """Bring everything to the disk, and return the bytes of each file."""
        for stream in self._files.values():
            stream.flush()
            os.fsync(stream.fileno())
        return {name: stream.tell() for name, stream in self._files.items()}

    def cut_back(self, sizes: dict[str, int]) -> bool:
        """Cut the files to `sizes`; False when one is shorter than that."""
        known = {name: os.fstat(stream.fileno()).st_size for name, stream in self._files.items()}
        if set(known) != set(sizes) or any(known[name] < sizes[name] for name in sizes):
            return False
        for name, stream in self._files.items():
            stream.truncate(sizes[name])
            stream.seek(sizes[name])
        return True

    def close(self) -> None:
        """Close the files."""
        for stream in self._files.values():
            stream.close()

    def write_index(self) -> None:
        """Write the index of everything that was added."""
        self.sizes()
        _write_index(self.folder, self.dtype)


def move_into_place(folder: Path, prefix: Path, *, masked: bool) -> None:
    """Give the finished files in `folder` their names at `prefix`, as far as that is not done yet;
    the folder is removed."""
    bin_path, idx_path = token_paths(prefix)
    if (folder / "tokens").exists():
        # an old index beside new ids would be a damaged pair
        idx_path.unlink(missing_ok=True)
        if not masked:
            mask_path(prefix).unlink(missing_ok=True)
    for name, final in (("tokens", bin_path), ("mask", mask_path(prefix)), ("index", idx_path)):
        if (folder / name).exists():
            os.replace(folder / name, final)
    shutil.rmtree(folder)


def _write_index(folder: Path, dtype: np.dtype[Any]) -> None:
    """Write `index` from `lengths`, a part at a time."""
    codes = {name: code for code, name in ID_TYPES.items()}
    count = (folder / "lengths").stat().st_size // 4
    with (folder / "index").open("wb") as out:
        out.write(INDEX_HEADER.pack(INDEX_MAGIC, 1, codes[dtype.name], count, count + 1))
        with (folder / "lengths").open("rb") as lengths:
            shutil.copyfileobj(lengths, out, _CHUNK)
        start = 0
        for part in _lengths(folder):
            ends = start + np.cumsum(part.astype(np.int64)) * dtype.itemsize
            out.write(np.concatenate([[start], ends[:-1]]).astype(np.int64).data)
            start = int(ends[-1])
        for first in range(0, count + 1, _CHUNK):
            out.write(np.arange(first, min(first + _CHUNK, count + 1), dtype=np.int64).data)
        out.flush()
        os.fsync(out.fileno())


def _lengths(folder: Path) -> Iterator[npt.NDArray[np.int32]]:
    with (folder / "lengths").open("rb") as stream:
        while content := stream.read(4 * _CHUNK):
            yield np.frombuffer(content, np.int32)


class TokenFileWriter:
    """Writes one pair and moves it into place on a clean exit of the `with` block; a block that
    fails leaves nothing."""

    def __init__(
        self, prefix: Path, *, vocab_size: int | None = None, dtype: npt.DTypeLike | None = None,
        masked: bool = False,
    ) -> None:  # fmt: skip
        """Open the files; ids are stored as `dtype`, or as `id_type` says for `vocab_size`; with
        `masked` the pair has a .mask file."""
        self.prefix = prefix
        self.num_documents = self.num_tokens = 0
        self.dtype = np.dtype(id_type(vocab_size or 0) if dtype is None else dtype)
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._files = TokenFolder(temporary_beside(prefix), self.dtype, masked=masked)

    def add(self, ids: Sequence[int]) -> None:
        """Append one document."""
        self.add_documents(np.asarray(ids), np.array([len(ids)]))

    def add_documents(
        self, ids: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer],
        mask: npt.NDArray[np.uint8] | None = None,
    ) -> None:  # fmt: skip
        """Append documents, as `TokenFolder.add` takes them."""
        self._files.add(ids, lengths, mask)
        self.num_documents += len(lengths)
        self.num_tokens += len(ids)

    def add_file(self, other: TokenFile) -> None:
        """Append all documents of another pair with the same id type, a part at a time. DataError
        when its mask is damaged."""
        assert other.tokens.dtype == self.dtype, "the caller compares the id types"
        start = 0
        for first in range(0, len(other.document_ends), _CHUNK):
            ends = np.asarray(other.document_ends[first : first + _CHUNK])
            self._files.add(
                other.tokens[:0], np.diff(np.concatenate([[start], ends])), other.mask_of(0, 0)
            )
            start = int(ends[-1])
        for first in range(0, len(other.tokens), _CHUNK):
            last = min(first + _CHUNK, len(other.tokens))
            mask = other.mask_of(first, last)
            if mask is not None:
                check_mask(other.prefix, first, mask)
            self._files.add(other.tokens[first:last], np.zeros(0, np.int32), mask)
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
        try:
            if kind is None:
                self._files.write_index()
                self._files.close()
                move_into_place(self._files.folder, self.prefix, masked=self._files.masked)
        except OSError as error:
            fault = error
        finally:
            try:
                self._files.close()
            except OSError as error:
                fault = fault or error
            shutil.rmtree(self._files.folder, ignore_errors=True)
        if is_disk_full(fault):
            raise SetupError(
                f"{self.prefix}: no space left on the disk; nothing was left there. "
                "Free space or choose another place"
            ) from fault
        if kind is None and fault is not None:
            raise fault
