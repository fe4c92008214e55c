"""What a prepared pair holds, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_hypenet.data.indexed import TokenFile

_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Lengths of the documents of a pair."""

    documents: int
    tokens: int
    longest: int
    """Tokens of the longest document."""
    seq_length: int
    """Length of a training sequence that the two shares below refer to."""
    cut_documents: float
    """Share of the documents that are longer than a sequence, and so are cut in any case."""
    cut_tokens: float
    """Share of the tokens that lie behind the first `seq_length` of their document: such a token
    never sees the beginning of it."""


def statistics(file: TokenFile, seq_length: int) -> Statistics:
    """Return the statistics of a pair, from its index alone. Pieces of a .txt file count as
    documents."""
    longest = cut = behind = start = 0
    for first in range(0, len(file.document_ends), _CHUNK):
        ends = np.asarray(file.document_ends[first : first + _CHUNK], dtype=np.int64)
        lengths = np.diff(np.concatenate([[start], ends]))
        start = int(ends[-1])
        longest = max(longest, int(lengths.max()))
        over = np.maximum(lengths - seq_length, 0)
        cut += int(np.count_nonzero(over))
        behind += int(over.sum())
    documents, tokens = len(file.document_ends), len(file.tokens)
    return Statistics(
        documents=documents,
        tokens=tokens,
        longest=longest,
        seq_length=seq_length,
        cut_documents=cut / max(1, documents),
        cut_tokens=behind / max(1, tokens),
    )
