"""Training sequences: windows of token streams in a seeded order, mixed with recall documents.

Every sample is a pure function of (seed, sample index), so the data position of a run is one
number, resuming costs nothing, and any number of processes can share the work by index.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_hypenet.data.indexed import TokenStream
from megatron_hypenet.data.recall import RecallTask
from megatron_hypenet.errors import DataError

_MASK = 2**64 - 1
_SHARE_UNITS = 1 << 20
"""Recall shares are rounded to this many parts, so that counting them is integer arithmetic: exact
at any sample index."""


def scramble(*words: int) -> int:
    """Return a well-mixed 64-bit number from integers (the finaliser of splitmix64, Steele et al.
    2014, chained over the words)."""
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def permuted(index: int, size: int, key: int) -> int:
    """Return the position of `index` in a pseudo-random permutation of range(size) chosen by `key`,
    in constant time and memory.

    A four-round Feistel network on the smallest even number of bits that holds `size`, applied
    until the result lies in the range (Black and Rogaway 2002, cycle walking: at most four tries on
    average).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left = index >> half
        right = index & mask
        for turn in range(4):
            left, right = right, left ^ (scramble(key, turn, right) & mask)
        index = (left << half) | right
        if index < size:
            return index


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """Raise DataError when a token id is negative or not below `vocab_size`."""
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocab_size:
        raise DataError(
            f"the token files hold id {lowest if lowest < 0 else highest}, "
            f"but the model's vocabulary has {vocab_size} entries; "
            "they were made with another tokenizer. Run `hypenet data prepare` with the teacher's."
        )


class Windows:
    """Windows of one text in a new order and at a new offset every epoch."""

    def __init__(self, text: TokenStream, seed: int) -> None:
        self.text = text
        self.seed = seed

    def per_epoch(self, seq_length: int) -> int:
        """Return the number of windows that fit for any offset of an epoch; adjacent ones share one
        token, the last target of one and the first input of the next."""
        windows = (len(self.text) - seq_length) // seq_length
        if windows >= 1:
            return windows
        if len(self.text) > seq_length:
            return 1
        raise DataError(
            f"the training text has {len(self.text)} tokens, one sequence needs {seq_length + 1} "
            "(seq_length + 1); "
            "add text or use a shorter seq_length."
        )

    def start(self, index: int, seq_length: int) -> int:
        """Return the first token of window `index` of the text."""
        epoch, place = divmod(index, windows := self.per_epoch(seq_length))
        slack = len(self.text) - (windows * seq_length + 1)
        offset = scramble(self.seed, epoch, 1) % (min(slack, seq_length - 1) + 1)
        return offset + seq_length * permuted(place, windows, scramble(self.seed, epoch, 2))


class TrainData:
    """Windows of one text, or of several in shares, with recall documents spread evenly among
    them."""

    def __init__(
        self,
        text: TokenStream,
        *,
        seed: int,
        vocab_size: int,
        end_of_document: int | None = None,
        recall: RecallTask | None = None,
        recall_fraction: float = 0.0,
        blend: Sequence[tuple[TokenStream, float]] = (),
    ) -> None:
        """Read the text; `end_of_document` is the token that ends each document of it, where that
        is known. `blend` has several texts with their weights, in the place of `text`.

        Raises DataError when a recall share is asked for without a recall task."""
        if recall_fraction > 0 and recall is None:
            raise DataError(
                f"data.recall_fraction={recall_fraction} needs recall documents; "
                "the tokenizer must offer the words for them."
            )
        self.vocab_size = vocab_size
        self.end_of_document = end_of_document
        self.recall = recall
        self._recall_units = round(recall_fraction * _SHARE_UNITS)
        # every text of a blend has an order of its own
        self._windows = [
            Windows(part, scramble(seed, 3, number)) for number, (part, _) in enumerate(blend)
        ] or [Windows(text, seed)]
        self._units = shares([weight for _, weight in blend] or [1.0])

    def batch(self, sample_start: int, count: int, seq_length: int) -> Tensor:
        """Return samples sample_start .. sample_start + count - 1 -> int64 [count, seq_length + 1].

        Raises DataError when the text is shorter than one sequence or holds an id outside the
        vocabulary: the files were checked before (data/corpus.py), but may have changed since.
        """
        rows = np.stack(
            [self.sample(index, seq_length) for index in range(sample_start, sample_start + count)]
        )
        check_ids(rows, self.vocab_size)
        return torch.from_numpy(rows)

    def document_ends(self, tokens: Tensor, sample_start: int) -> Tensor:
        """Return where documents end in `tokens`, a batch that starts with sample `sample_start`:
        bool of the same shape.

        Documents end at end-of-document tokens; in text from files without such tokens, and in
        conversations, they end at the boundaries of the files' index. Raises DataError when the
        prepared data names neither.
        """
        by_index = any(windows.text.has_document_ends for windows in self._windows)
        if self.end_of_document is None and not by_index:
            raise DataError(
                "data.separate_documents=true, but the prepared data does not name its "
                "end-of-document token; "
                "delete the data folder of this run, it will be made again"
            )
        ends = (
            torch.zeros_like(tokens, dtype=torch.bool)
            if self.end_of_document is None
            else tokens == self.end_of_document
        )
        if by_index:
            seq_length = tokens.shape[1] - 1
            for row, index in enumerate(range(sample_start, sample_start + len(tokens))):
                found = self._window(index, seq_length)
                if found is not None:
                    text, start = found
                    last, known = text.last_tokens(start, start + seq_length + 1)
                    ends[row] = torch.from_numpy(last) | (ends[row] & ~torch.from_numpy(known))
        return ends

    def answers(self, sample_start: int, count: int, seq_length: int) -> Tensor | None:
        """Return which tokens of `batch` are to be predicted: bool [count, seq_length + 1]. None
        when no text of this data has a mask: then all are."""
        if not any(windows.text.has_masks for windows in self._windows):
            return None
        rows = np.ones((count, seq_length + 1), dtype=np.bool_)
        for row in range(count):
            found = self._window(sample_start + row, seq_length)
            if found is not None:
                text, start = found
                rows[row] = text.answers(start, start + seq_length + 1)
        return torch.from_numpy(rows)

    def predicted(self, sample_start: int, count: int, seq_length: int) -> Tensor:
        """Return the positions of these samples whose next token counts where recall is what
        matters: in recall documents those before an answer, in text all, or those that its mask
        says. bool [count, seq_length]."""
        answers = self.answers(sample_start, count, seq_length)
        rows = torch.ones(count, seq_length, dtype=torch.bool)
        if answers is not None:
            rows &= answers[:, 1:]  # the label of a position is the token behind it
        for row, index in enumerate(range(sample_start, sample_start + count)):
            if self._window(index, seq_length) is None:
                _, places = self._document(index, seq_length)
                rows[row] = False
                rows[row, torch.from_numpy(places)] = True
        return rows

    def sample(self, index: int, seq_length: int) -> np.ndarray:
        """Return one sample, int64 [seq_length + 1]."""
        found = self._window(index, seq_length)
        if found is None:
            return self._document(index, seq_length)[0]
        text, start = found
        return text[start : start + seq_length + 1]

    def _document(self, index: int, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the recall document of sample `index`, and the positions before its answers."""
        assert self.recall is not None, "the constructor refuses a share without a task"
        return self.recall.document(self._recalls_before(index)[0], seq_length, training=True)

    def windows_per_epoch(self, seq_length: int) -> int:
        """Return the number of windows of all texts. Raises DataError when one of them has none."""
        return sum(windows.per_epoch(seq_length) for windows in self._windows)

    def _window(self, index: int, seq_length: int) -> tuple[TokenStream, int] | None:
        """Return (text, first token) of sample `index`; None for a recall document."""
        recalls, is_recall = self._recalls_before(index)
        if is_recall:
            return None
        number, place = taken_from(index - recalls, self._units)
        windows = self._windows[number]
        return windows.text, windows.start(place, seq_length)

    def _recalls_before(self, index: int) -> tuple[int, bool]:
        """Return how many recall documents come before sample `index`, and whether it is one."""
        recalls = index * self._recall_units // _SHARE_UNITS
        return recalls, (index + 1) * self._recall_units // _SHARE_UNITS > recalls


def shares(weights: Sequence[float]) -> list[int]:
    """Return the share of each entry among itself and those behind it, in parts of _SHARE_UNITS;
    the last has all of them."""
    return [
        max(1, round(weight / sum(weights[number:]) * _SHARE_UNITS))
        for number, weight in enumerate(weights)
    ]


def taken_from(index: int, units: Sequence[int]) -> tuple[int, int]:
    """Return (entry, number of samples that it gave before) for sample `index` of a blend with
    these `shares`: every entry is spread evenly over what the ones before it leave."""
    for number, part in enumerate(units):
        before = index * part // _SHARE_UNITS
        if (index + 1) * part // _SHARE_UNITS > before:
            return number, before
        index -= before
    raise AssertionError("the last entry takes what is left")
