"""Losses of a chunk of student logits for the loop over chunks: statistics that shards of the
vocabulary exchange, the loss of each token, and the gradient of the logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import ModuleType
from typing import Protocol

from torch import Tensor

from megatron_hypenet.ops.dtypes import accumulation_dtype
from megatron_hypenet.parallel.vocab_loss import torch_terms
from megatron_hypenet.parallel.vocab_loss.gradients import product
from megatron_hypenet.parallel.vocab_loss.split import VocabSplit


class Loss(Protocol):
    """A loss of student logits [n, v] in the accumulation dtype."""

    numbers: int
    """Numbers per token that `chunk` returns."""
    logit_sets: int
    """Elements of the accumulation dtype per logit of a chunk: the student's, and more with a
    teacher."""

    def chunk(
        self,
        rows: slice,
        logits: Tensor,
        weights: Tensor | None,
        out: Tensor | None,
        split: VocabSplit,
    ) -> Tensor:
        """Return numbers [numbers, n] of the tokens `rows` over the whole vocabulary, from their
        logits on this rank, which are destroyed. The gradient of their losses, each times its
        weight, is written to `out` [n, v] unless it is None."""

    def per_token(self, numbers: Tensor) -> Tensor:
        """Return the loss of every token from its numbers, and behind it what is reported beside
        it: [1 or more, n]."""


class TeacherHead:
    """A teacher's logits of this rank's part of the vocabulary, a chunk of tokens at a time."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.hidden = hidden
        self.weight = weight
        self._buffer = hidden.new_empty(0, dtype=accumulation_dtype(hidden.dtype))

    def logits(self, rows: slice) -> Tensor:
        """Return logits [n, v] in the accumulation dtype, valid until the next call."""
        part = self.hidden[rows]
        if len(part) > len(self._buffer):
            self._buffer = self._buffer.new_empty(len(part), self.weight.shape[0])
        return product(part, self.weight.t(), self._buffer[: len(part)])


class _TermsLoss(ABC):
    """A loss by terms that have kernels on CUDA: of student logits and one tensor beside them."""

    def __init__(
        self,
        stats: Callable[[Tensor, Tensor], Tensor],
        merge: Callable[[Tensor], Tensor],
        gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor], None],
        stats_and_gradient: Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor],
    ) -> None:
        """Take the terms (`torch_terms.py` says what each computes)."""
        self._stats = stats
        self._merge = merge
        self._gradient = gradient
        self._stats_and_gradient = stats_and_gradient

    @abstractmethod
    def beside(self, rows: slice) -> Tensor:
        """Return what the terms take beside the student's logits of the tokens `rows`."""

    def chunk(
        self,
        rows: slice,
        logits: Tensor,
        weights: Tensor | None,
        out: Tensor | None,
        split: VocabSplit,
    ) -> Tensor:
        """Compute `Loss.chunk` with one exchange over the ranks."""
        other = self.beside(rows)
        if out is not None and split.size == 1:
            return self._stats_and_gradient(logits, other, weights, out)
        local = self._merge(self._stats(logits, other))
        merged = local if split.size == 1 else self._merge(split.gather_numbers(local))
        if out is not None:
            self._gradient(logits, other, local, merged, weights, out)
        return merged


class ForwardKLLoss(_TermsLoss):
    """Forward KL to a teacher with a head of its own."""

    numbers = 5

    def __init__(self, terms: ModuleType, teacher: TeacherHead) -> None:
        super().__init__(
            terms.kl_stats, terms.kl_merge, terms.kl_gradient, terms.kl_stats_and_gradient
        )
        self.teacher = teacher
        # torch has the difference of both models' logits in memory too
        self.logit_sets = 2 + (terms is torch_terms)

    def beside(self, rows: slice) -> Tensor:
        """Return the teacher's logits."""
        return self.teacher.logits(rows)

    def per_token(self, numbers: Tensor) -> Tensor:
        """Return the divergence of each token [1, n]."""
        return torch_terms.kl_loss(numbers)[None]


class CrossEntropyLoss(_TermsLoss):
    """Cross entropy of labels counted from this shard's first row of the vocabulary."""

    numbers = 3
    logit_sets = 1

    def __init__(self, terms: ModuleType, labels: Tensor) -> None:
        super().__init__(
            terms.ce_stats, terms.ce_merge, terms.ce_gradient, terms.ce_stats_and_gradient
        )
        self.labels = labels

    def beside(self, rows: slice) -> Tensor:
        """Return the labels."""
        return self.labels[rows]

    def per_token(self, numbers: Tensor) -> Tensor:
        """Return the negative log likelihood of each label [1, n]."""
        return torch_terms.ce_loss(numbers)[None]
