"""Check that the ids of a token file belong to the model's vocabulary, in one pass over the
memory-mapped file before training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_hypenet.data.indexed import TokenFile, check_mask
from megatron_hypenet.data.pairs import token_paths
from megatron_hypenet.errors import DataError

_CHUNK = 1 << 22
"""Number of tokens checked at a time: a few MB, which stay in the cache between the passes over
them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IdRange:
    """The smallest and largest id of a token file, and its number of end tokens."""

    lowest: int
    highest: int
    ends: int
    """Number of end-of-document tokens; 0 where no such token was given."""
    answers: int | None = None
    """Number of tokens that are to be predicted; None for a file without a mask."""


def scan_ids(
    file: TokenFile, vocab_size: int | None, *, end_of_document: int | None = None
) -> IdRange:
    """Return the range of a file's ids. DataError names the first id that is negative or not below
    `vocab_size`, and its place, or a mask with other values than 0 and 1."""
    kind = file.tokens.dtype
    lowest = np.iinfo(kind).max
    highest = np.iinfo(kind).min
    ends = 0
    limit = np.iinfo(np.int64).max if vocab_size is None else vocab_size
    end = (
        None
        if end_of_document is None
        or not np.iinfo(kind).min <= end_of_document <= np.iinfo(kind).max
        else kind.type(end_of_document)
    )
    for start in range(0, len(file.tokens), _CHUNK):
        part = file.tokens[start : start + _CHUNK]
        low, high = int(part.min()), int(part.max())
        if low < 0 or high >= limit:
            _refuse(file, start, part, limit, vocab_size)
        lowest, highest = min(lowest, low), max(highest, high)
        if end is not None:
            ends += int(np.count_nonzero(part == end))
    return IdRange(
        lowest=int(lowest), highest=int(highest), ends=ends, answers=_count_answers(file)
    )


def _count_answers(file: TokenFile) -> int | None:
    """Count the ones in the mask. DataError for a mask with other values than 0 and 1."""
    if file.mask is None:
        return None
    count = 0
    for start in range(0, len(file.mask), _CHUNK):
        part = file.mask[start : start + _CHUNK]
        check_mask(file.prefix, start, part)
        count += int(np.count_nonzero(part))
    return count


def _refuse(
    file: TokenFile, start: int, part: npt.NDArray[np.integer], limit: int, vocab_size: int | None
) -> None:
    ids = part.astype(np.int64)
    place = start + int(np.argmax((ids < 0) | (ids >= limit)))
    document = int(np.searchsorted(file.document_ends, place, side="right"))
    rule = (
        "ids are not negative"
        if vocab_size is None
        else f"the model's vocabulary has {vocab_size} entries, 0 to {vocab_size - 1}"
    )
    raise DataError(
        f"{token_paths(file.prefix)[0]}: token {place:,} (in document {document:,}) is "
        f"{int(file.tokens[place])}, but {rule}; the file "
        "was made with another tokenizer or is damaged. Run `hypenet data prepare` with the "
        "teacher's tokenizer"
    )
