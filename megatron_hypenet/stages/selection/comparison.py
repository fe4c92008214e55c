"""KL between a frozen model and the same model after a change, on any parallel layout.

Rows are spread over the data-parallel ranks a micro-batch at a time, in any number; what is missing
in a last micro-batch, or in a length that the layout cannot split, is filled with positions that do
not count. Logits exist for a chunk of tokens at a time only (parallel/vocab_loss).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hypenet.model.hypenet import HypeNetModel
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.context.layout import split_sequence
from megatron_hypenet.parallel.cpu import device
from megatron_hypenet.parallel.pipeline import run_pipeline
from megatron_hypenet.parallel.vocab_loss import linear_kl


@dataclass(frozen=True, slots=True)
class Rows:
    """Sequences to compare the models on."""

    tokens: Tensor
    """[n, t], int64."""
    predicted: Tensor
    """[n, t], bool: the positions whose next-token distributions are compared."""
    micro_batch_size: int
    """Rows in one forward pass of a data-parallel rank."""


@dataclass(slots=True)
class Reference:
    """One micro-batch on this rank, with what the model gave before it was changed."""

    inputs: Tensor
    """[b, t / context ranks]."""
    weights: Tensor
    """Weight of each position, same shape."""
    hidden: Tensor | None = None
    """Final hidden states [t, b, h], on the last pipeline stage."""


class Comparison:
    """A frozen model that is changed between two passes over the same rows."""

    def __init__(self, model: HypeNetModel) -> None:
        """Freeze `model`, with all that is in it now."""
        model.requires_grad_(False)
        model.eval()
        self.model = model

    @staticmethod
    def rows_at_once(micro_batch_size: int) -> int:
        """Return the rows that keep all ranks busy: a micro-batch for each data-parallel rank, and
        more for a pipeline."""
        stages = groups.pipeline_stage()[1]
        return micro_batch_size * groups.data_size() * (1 if stages == 1 else 2 * stages)

    def reference(self, rows: Rows) -> list[Reference]:
        """Run the model as it is now, before a change."""
        mine = self._local(rows)

        def keep(index: int, hidden: Tensor) -> None:
            mine[index].hidden = hidden

        self._flow(mine, keep, train=False)
        return mine

    def kl(self, reference: Sequence[Reference], *, train: bool = False) -> float:
        """Return KL(reference || the model as it is now), summed over the rows of all ranks, each
        the mean over the positions that count; 0 for a row without any. With `train`, gradients of
        this rank's part of the sum accumulate (`over_ranks` completes them)."""
        total = torch.zeros((), dtype=torch.float64, device=device())
        head = self.model.head_weight() if self.model.post_process else None

        def compare(index: int, hidden: Tensor) -> Tensor:
            part = reference[index]
            assert part.hidden is not None and head is not None, "the last stage has both"
            loss = len(part.inputs) * linear_kl(
                hidden,
                head,
                part.hidden,
                head,
                chunk_tokens=None,
                group=groups.tensor_group(),
                sequence_parallel=self.model.config.sequence_parallel,
                token_weights=part.weights.t(),
            )
            total.add_(loss.detach())
            return loss

        self._flow(reference, compare, train=train)
        return float(self.over_ranks(total))

    @staticmethod
    def over_ranks(part: Tensor) -> Tensor:
        """Sum what ranks have of different rows, positions and layers, in place; returns it. Ranks
        of one tensor-parallel group have the same."""
        # parts of a sequence are means over its own tokens, so their mean is the whole's
        return groups.sum_over_pipeline(groups.all_reduce_mean(part).mul_(groups.data_size()))

    def _local(self, rows: Rows) -> list[Reference]:
        """Return this rank's part of the rows."""
        count, length = rows.tokens.shape
        size = rows.micro_batch_size
        fill = (0, -length % self.model.parallel.sequence_unit, 0, -count % size)
        tokens, counted = F.pad(rows.tokens, fill), F.pad(rows.predicted, fill)
        # linear_kl divides by all positions, and a row's mean is over those that count
        share = counted.double() / counted.sum(dim=1, keepdim=True).clamp(min=1)
        weights = share * tokens.shape[1]
        group = self.model.pg_collection.cp
        found = []
        for first in range(groups.data_rank() * size, len(tokens), groups.data_size() * size):
            part = slice(first, first + size)
            mine = (
                split_sequence(whole[part].to(device()), group, dim=1).contiguous()
                for whole in (tokens, weights)
            )
            found.append(Reference(*mine))
        return found

    def _flow(
        self,
        parts: Sequence[Reference],
        finish: Callable[[int, Tensor], Tensor | None],
        *,
        train: bool,
    ) -> None:
        """Run this rank's micro-batches through the model; `finish(i, hidden)` gets the final
        hidden states, and with `train` returns what is differentiated, as a sum."""
        if not parts:
            return
        if groups.pipeline_stage()[1] == 1:
            for index, part in enumerate(parts):
                with torch.set_grad_enabled(train):
                    loss = finish(index, self.model.hidden(part.inputs))
                if train and loss is not None:
                    loss.backward()
            return

        def scaled(index: int, hidden: Tensor) -> Tensor | None:
            loss = finish(index, hidden)
            return None if loss is None else loss * len(parts)  # the schedule takes their mean

        rows, length = parts[0].inputs.shape
        run_pipeline(
            self.model.chunks,
            len(parts),
            seq_length=length * groups.context_group().size(),
            micro_batch_size=rows,
            step=lambda index, chunk: self.model.hidden(parts[index].inputs, chunk=chunk),
            finish=scaled,
            train=train,
        )
