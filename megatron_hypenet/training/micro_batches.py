"""The micro-batches of one optimizer step on this process: their samples, their device, and the
description of packed documents."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from megatron_hypenet.config.schema import StageConfig
from megatron_hypenet.data.documents import document_ids, loss_weights
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.cpu import device
from megatron_hypenet.stages.base import MicroBatch
from megatron_hypenet.supervision.heartbeat import PROGRESS


class TokenSource(Protocol):
    """Training data as a pure function of the sample index, so that the position in it is one
    number."""

    def batch(self, sample_start: int, count: int, seq_length: int) -> Tensor:
        """Return samples sample_start .. + count - 1: int64 [count, seq_length + 1]."""
        ...

    def document_ends(self, tokens: Tensor, sample_start: int) -> Tensor:
        """Return which of `tokens`, a batch that starts with sample `sample_start`, are the last of
        their document.

        tokens is int64 [count, seq_length + 1], the result bool of the same shape. Raises DataError
        when the data has no document boundaries."""
        ...

    def answers(self, sample_start: int, count: int, seq_length: int) -> Tensor | None:
        """Return which tokens of `batch` are to be predicted, bool [count, seq_length + 1]; None,
        for every batch, of data in which all are."""
        ...


class StepReader:
    """Reads the micro-batches of steps, perhaps one step ahead of the device."""

    def __init__(self, data: TokenSource, config: StageConfig, *, separate: bool) -> None:
        self.data = data
        self.config = config
        self.separate = separate
        self._ahead: tuple[int, list[MicroBatch]] | None = None
        """First sample and micro-batches of a step that has not begun."""

    def take(self, first_sample: int) -> list[MicroBatch]:
        """Return the micro-batches of the step that begins with `first_sample`. What was read ahead
        is forgotten here."""
        ahead = self._ahead
        self._ahead = None
        return ahead[1] if ahead and ahead[0] == first_sample else self._read(first_sample)

    def read_ahead(self, first_sample: int) -> None:
        """Read a step's micro-batches for the next `take`."""
        self._ahead = (first_sample, self._read(first_sample))

    def _read(self, first_sample: int) -> list[MicroBatch]:
        PROGRESS.note("data")
        return step_batches(self.data, self.config, first_sample, separate=self.separate)


def step_batches(
    data: TokenSource, config: StageConfig, first_sample: int, *, separate: bool = False
) -> list[MicroBatch]:
    """Return this data-parallel rank's micro-batches of the step that begins with `first_sample`;
    ranks of one replica get the same.

    With `separate` documents are kept apart: each batch also holds their ids, and loss weights that
    leave out predictions across a boundary. Data of which only a part is to be predicted gives loss
    weights that leave out the rest. Either way the loss is averaged over the remaining labels of
    the whole step on all ranks."""
    share = config.global_batch_size // groups.data_size()
    start = first_sample + groups.data_rank() * share
    batches: list[MicroBatch] = []
    ends: list[Tensor] = []
    answers: list[Tensor] = []
    where = device()
    for offset in range(0, share, config.micro_batch_size):
        first = start + offset
        tokens = data.batch(first, config.micro_batch_size, config.seq_length)
        if separate:
            ends.append(data.document_ends(tokens, first)[:, :-1].to(where))
        counted = data.answers(first, config.micro_batch_size, config.seq_length)
        if counted is not None:
            # the label of a position is the token behind it
            answers.append(counted[:, 1:].to(where, torch.float32))
        if where.type == "cuda":
            # a copy from memory that is not pinned would wait for all work of the device
            tokens = tokens.pin_memory()
        batches.append(MicroBatch(tokens.to(where, non_blocking=True)))
    if separate:
        within = [loss_weights(part) for part in ends]
        batches = [
            replace(batch, document_ids=document_ids(part), token_weights=weight)
            for batch, part, weight in zip(
                batches, ends, _averaged(within, config.tokens_per_step), strict=True
            )
        ]
    if not answers:
        return batches
    labels = (
        [one * other for one, other in zip(answers, within, strict=True)] if separate else answers
    )
    return [
        replace(batch, token_weights=label, answer_weights=answer)
        for batch, label, answer in zip(
            batches,
            _averaged(labels, config.tokens_per_step),
            _averaged(answers, config.tokens_per_step),
            strict=True,
        )
    ]


def _averaged(weights: list[Tensor], tokens_per_step: int) -> list[Tensor]:
    """Return weights of 0 and 1 for this rank's labels, scaled so that the loss becomes a mean over
    the labels that count."""
    # Every rank divides its sum by its own number of tokens, and the ranks' results are averaged:
    # this factor makes the whole a mean over the labels that count. A step without any has loss 0.
    counted = groups.all_reduce_over_samples(
        torch.stack([weight.sum() for weight in weights]).sum()
    )
    factor = tokens_per_step / counted.clamp(min=1)
    return [weight * factor for weight in weights]
