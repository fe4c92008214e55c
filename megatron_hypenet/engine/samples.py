"""The micro-batches of one optimizer step on this process: which samples, on which device, and what tells packed documents apart."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megatron_hypenet.config.schema import StageConfig
from megatron_hypenet.data.documents import document_ids, loss_weights
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.cpu import device
from megatron_hypenet.stages.base import Batch


class TokenSource(Protocol):
    """Training data: a pure function of the sample index, so that a position is one number."""

    @property
    def end_of_document(self) -> int | None:
        """The token that ends a document; None when the data does not say."""
        ...

    def batch(self, sample_start: int, count: int, seq_length: int) -> Tensor:
        """Samples sample_start .. + count - 1: int64 [count, seq_length + 1]."""
        ...


def step_batches(data: TokenSource, config: StageConfig, first_sample: int, *, end_of_document: int | None = None) -> list[Batch]:
    """This data-parallel rank's micro-batches of the step that begins with `first_sample`; ranks of one replica get the same.

    With `end_of_document` (a token id) documents are separate: each batch also holds their ids, and loss weights that leave out
    predictions across a boundary and average the loss over the real labels of the whole step, wherever they lie."""
    share = config.global_batch_size // groups.data_size()
    start = first_sample + groups.data_rank() * share
    batches: list[Batch] = []
    where = device()
    for offset in range(0, share, config.micro_batch_size):
        tokens = data.batch(start + offset, config.micro_batch_size, config.seq_length)
        if where.type == "cuda":
            tokens = tokens.pin_memory()  # a copy from other memory waits for all that the device has to do
        batches.append({"tokens": tokens.to(where, non_blocking=True)})
    return batches if end_of_document is None else _separated(batches, end_of_document, config.tokens_per_step)


def _separated(batches: list[Batch], end_of_document: int, tokens_per_step: int) -> list[Batch]:
    inputs = [batch["tokens"][:, :-1] for batch in batches]
    weights = [loss_weights(part, end_of_document) for part in inputs]
    # Every rank divides its sum by its own number of tokens, and the ranks' results are averaged: this factor makes the whole a mean over
    # the labels that count. A step without any has loss 0.
    counted = groups.all_reduce_over_samples(torch.stack([weight.sum() for weight in weights]).sum())
    factor = tokens_per_step / counted.clamp(min=1)
    return [
        {**batch, "document_ids": document_ids(part, end_of_document), "token_weights": weight * factor}
        for batch, part, weight in zip(batches, inputs, weights, strict=True)
    ]
