"""The document of each token, and the packing of queries and keys by document for a kernel that
takes sequences of many lengths."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Span = tuple[int, int]
"""Positions [start, stop)."""


@dataclass(frozen=True)
class Packing:
    """Queries and keys of one block, document by document: those whose document is on both sides.

    Indices are rows of the tensors [b * m, ...] and [b * n, ...], None when that is all of them in
    order; bounds are int32 [documents + 1] as flash attention takes them, and the lengths of the
    longest documents are integers."""

    query_rows: Tensor | None
    key_rows: Tensor | None
    query_bounds: Tensor
    key_bounds: Tensor
    max_queries: int
    max_keys: int

    @property
    def empty(self) -> bool:
        """Return true when no query sees any key."""
        return self.query_bounds.numel() == 1


class Documents:
    """document_ids [b, T] of the whole sequence, non-decreasing along T within a row, and what was
    derived from them.

    Packings need the ids on the host once; they are cached as long as the tensor of ids exists (a
    batch, all its layers), so that a step needs one device synchronisation."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        # inference tensors have no version counter
        self._derived = _Derived(0) if ids.is_inference() else _kept(ids)

    def ids_at(self, spans: tuple[Span, ...]) -> Tensor:
        """Return the ids at the given positions, in that order: [b, sum of lengths]."""
        parts = [self.ids[:, start:stop] for start, stop in spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def packing(self, queries: tuple[Span, ...], keys: tuple[Span, ...]) -> Packing:
        """Return the packing of a block with these positions."""
        derived = self._derived
        if derived.host is None:
            derived.host = self.ids.cpu().numpy()
        if (queries, keys) not in derived.packings:
            sides = [
                np.concatenate([derived.host[:, a:b] for a, b in spans], axis=1)
                for spans in (queries, keys)
            ]
            derived.packings[queries, keys] = _pack(sides[0], sides[1], self.ids.device)
        return derived.packings[queries, keys]


class _Derived:
    """Everything computed from one tensor of ids, without the tensor: the cache must not keep its
    keys alive."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.host: np.ndarray | None = None
        self.packings: dict[tuple[tuple[Span, ...], tuple[Span, ...]], Packing] = {}


_DERIVED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _kept(ids: Tensor) -> _Derived:
    """Return what was derived from `ids` since its last change."""
    derived = _DERIVED.get(ids)
    if derived is None or derived.version != ids._version:
        derived = _DERIVED[ids] = _Derived(ids._version)
    return derived


def _pack(query_ids: np.ndarray, key_ids: np.ndarray, device: torch.device) -> Packing:
    shared = [
        np.intersect1d(query_row, key_row)
        for query_row, key_row in zip(query_ids, key_ids, strict=True)
    ]
    indices, bounds, longest = [], [], []
    for ids in (query_ids, key_ids):
        kept = [np.flatnonzero(np.isin(row, both)) for row, both in zip(ids, shared, strict=True)]
        counts = np.concatenate(
            [np.unique(row[at], return_counts=True)[1] for row, at in zip(ids, kept, strict=True)]
        )
        index = np.concatenate([at + number * ids.shape[1] for number, at in enumerate(kept)])
        indices.append(None if index.size == ids.size else torch.from_numpy(index).to(device))
        bounds.append(
            torch.from_numpy(np.concatenate([[0], counts.cumsum()]).astype(np.int32)).to(device)
        )
        longest.append(int(counts.max(initial=0)))
    return Packing(indices[0], indices[1], bounds[0], bounds[1], longest[0], longest[1])
