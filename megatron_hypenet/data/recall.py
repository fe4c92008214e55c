"""Key-value recall documents: text with facts at random places, and questions about them.

A fact reads `\\n[ key value ]\\n`; key and value are words that are one token each, so one position
of the sequence holds the answer. A question repeats the statement: after `[ key` a model that
remembers the fact predicts the next token. Evaluation documents keep the number of facts fixed and
let the filler grow with the length, so in a longer document the facts lie further back. A document
is a pure function of (seed, index, length, number of facts). This module knows token ids only;
`data/tokenizer.py` finds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_hypenet.errors import DataError

TokenArray = npt.NDArray[np.int64]


class TokenSlices(Protocol):
    """A one-dimensional sequence of tokens that can be sliced: an array, a memory map or a
    TokenStream."""

    def __len__(self) -> int:
        """Return the number of tokens."""

    def __getitem__(self, where: slice, /) -> npt.NDArray[np.integer]:
        """Return the tokens of the slice."""


@dataclass(frozen=True, kw_only=True)
class RecallVocabulary:
    """Token ids that spell a fact in one tokenizer."""

    words: tuple[int, ...]
    """Single tokens that are whole words; keys and values are drawn from them."""
    opening: tuple[int, ...]
    """Tokens before the key."""
    separator: tuple[int, ...]
    """Tokens between key and value, possibly none. The value is predicted at the last token before
    it."""
    closing: tuple[int, ...]
    """Tokens after the value."""

    @property
    def fact_tokens(self) -> int:
        """Return the tokens of one whole statement."""
        return len(self.opening) + 1 + len(self.separator) + 1 + len(self.closing)

    def check(self, num_pairs: int, seq_length: int) -> None:
        """Raise DataError when recall documents with `num_pairs` facts cannot be made in
        `seq_length` tokens: every fact is stated and asked for, with words of its own."""
        if len(self.words) < 4 * num_pairs:
            raise DataError(
                f"the tokenizer has {len(self.words)} one-token words of 3 to 8 letters; "
                f"{num_pairs} recall pairs need "
                f"{4 * num_pairs}. Use fewer recall pairs, or a tokenizer with a larger vocabulary."
            )
        refuse_short(num_pairs, seq_length, self.fact_tokens)

    @property
    def answer_offset(self) -> int:
        """Index, within a statement, of the token whose successor is the value."""
        return len(self.opening) + len(self.separator)


def refuse_short(num_pairs: int, seq_length: int, fact_tokens: int) -> None:
    """Raise DataError when statements and questions of `num_pairs` facts, of `fact_tokens` tokens
    each, are longer than `seq_length`."""
    least = 2 * num_pairs * fact_tokens
    if seq_length < least:
        raise DataError(
            f"a recall document with {num_pairs} facts needs at least {least} tokens; seq_length "
            f"is {seq_length}. Use a longer seq_length or fewer recall pairs."
        )


class RecallTask:
    """Recall documents for one tokenizer over one stream of filler text."""

    def __init__(
        self, vocabulary: RecallVocabulary, filler: TokenSlices, *, seed: int, num_pairs: int = 8
    ) -> None:
        """`filler` is the text between the facts; an evaluation document has `num_pairs` facts.

        Raises DataError when the vocabulary has fewer than 4 words a fact, or the stream is empty.
        """
        vocabulary.check(num_pairs, 2 * num_pairs * vocabulary.fact_tokens)
        if len(filler) < 2:
            raise DataError(
                "the filler text of the recall documents is empty; give a text with at least one "
                "sequence of tokens."
            )
        self.vocabulary = vocabulary
        self.filler = filler
        self.seed = seed
        self.num_pairs = num_pairs
        self._words = np.asarray(vocabulary.words, dtype=np.int64)

    def document(
        self, index: int, seq_length: int, *, training: bool = False
    ) -> tuple[TokenArray, TokenArray]:
        """Make document `index` -> (ids [seq_length + 1], answer positions).

        Position p is an answer position when ids[p + 1] is the value asked for: it indexes scores
        of ids[:-1] against ids[1:]. Evaluation: facts are spread uniformly over everything before
        the questions, and each is asked once, at the end, in random order. Training: 2 to
        `num_pairs` facts; about half of the questions come earlier, anywhere after their fact, and
        every second document asks again and again: without such dense documents a small model needs
        very long to learn to look a fact up. Raises DataError when `seq_length` is too short for
        the facts.
        """
        rng = np.random.Generator(
            np.random.Philox(
                key=[self.seed & (2**64 - 1), (2 * index + int(training)) & (2**64 - 1)]
            )
        )
        refuse_short(self.num_pairs, seq_length, self.vocabulary.fact_tokens)
        num_pairs = int(rng.integers(2, self.num_pairs + 1)) if training else self.num_pairs
        words = rng.choice(self._words, size=2 * num_pairs, replace=False)
        facts = [self._fact(words[2 * i], words[2 * i + 1]) for i in range(num_pairs)]
        last = [int(fact) for fact in rng.permutation(num_pairs)]
        early: list[int] = []
        if training:
            early = [fact for fact in last if rng.random() < 0.5]
            last = [fact for fact in last if fact not in early]
            if rng.random() < 0.5:
                room = (seq_length + 1) // self.vocabulary.fact_tokens - 2 * num_pairs
                early += [
                    int(fact)
                    for fact in rng.integers(0, num_pairs, size=int(rng.uniform(0.2, 0.9) * room))
                ]
        num_filler = (
            seq_length + 1 - (num_pairs + len(early) + len(last)) * self.vocabulary.fact_tokens
        )
        places = self._places(rng, num_filler, num_pairs, early) + [
            (num_filler, fact, True) for fact in last
        ]
        return self._assemble(rng, num_filler, facts, places)

    def batch(self, start: int, count: int, seq_length: int) -> tuple[TokenArray, TokenArray]:
        """Make evaluation documents start..start+count-1 -> ids [count, seq_length + 1], answer
        positions [count, num_pairs]."""
        documents = [self.document(start + i, seq_length) for i in range(count)]
        return np.stack([ids for ids, _ in documents]), np.stack(
            [answers for _, answers in documents]
        )

    def _fact(self, key: int, value: int) -> TokenArray:
        v = self.vocabulary
        return np.array([*v.opening, key, *v.separator, value, *v.closing], dtype=np.int64)

    @staticmethod
    def _places(
        rng: np.random.Generator, num_filler: int, num_pairs: int, early: list[int]
    ) -> list[tuple[int, int, bool]]:
        """Return (filler tokens before it, fact, is it a question), in document order; a question
        never precedes its fact."""
        # one fact in each of num_pairs equal stretches: spread over the whole document at any
        # length
        edges = np.linspace(0, num_filler, num_pairs + 1)
        stated = [
            int(rng.integers(int(edges[i]), max(int(edges[i]) + 1, int(edges[i + 1]))))
            for i in range(num_pairs)
        ]
        places = [(cut, fact, False) for fact, cut in enumerate(stated)]
        places += [(int(rng.integers(stated[fact], num_filler + 1)), fact, True) for fact in early]
        # False sorts before True: at the same place the statement comes before the question
        return sorted(places, key=lambda place: (place[0], place[2]))

    def _assemble(
        self,
        rng: np.random.Generator,
        num_filler: int,
        facts: list[TokenArray],
        places: list[tuple[int, int, bool]],
    ) -> tuple[TokenArray, TokenArray]:
        """Put filler and a statement or question at each place -> (ids, answer positions)."""
        filler = self._filler(rng, num_filler)
        pieces: list[TokenArray] = []
        answers: list[int] = []
        taken = length = 0
        for cut, fact, question in places:
            pieces += [filler[taken:cut], facts[fact]]
            length += cut - taken
            taken = cut
            if question:
                answers.append(length + self.vocabulary.answer_offset)
            length += len(facts[fact])
        pieces.append(filler[taken:])
        return np.concatenate(pieces), np.array(answers, dtype=np.int64)

    def _filler(self, rng: np.random.Generator, count: int) -> TokenArray:
        """Return `count` consecutive tokens of the stream from a random start, wrapping at its
        end."""
        start = int(rng.integers(0, len(self.filler)))
        head = np.asarray(self.filler[start : start + count], dtype=np.int64)
        while len(head) < count:
            head = np.concatenate(
                [head, np.asarray(self.filler[: count - len(head)], dtype=np.int64)]
            )
        return head
