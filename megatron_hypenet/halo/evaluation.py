"""Evaluation of models: the check of the teacher, the scores for layer selection, and the rows of
the report.

Recall documents use held-out text, so nothing that is evaluated was trained on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from megatron_hypenet.config.schema import RunConfig
from megatron_hypenet.data.recall import RecallTask
from megatron_hypenet.errors import DataError
from megatron_hypenet.eval.heldout import TokenScores, heldout_loss, sequence_losses
from megatron_hypenet.eval.intervals import standard_error
from megatron_hypenet.eval.recall import recall_accuracy
from megatron_hypenet.model.hypenet import HypeNetModel
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.cpu import device
from megatron_hypenet.stages.base import MicroBatch, StageModule
from megatron_hypenet.training.schedule import stage_values
from megatron_hypenet.training.tags import ACCURACY, LM_LOSS, RECALL

Row = dict[str, Any]
"""One model in the report: heldout_loss, heldout_accuracy, and recall and loss by length
multiple."""


class Scoring(Protocol):
    """A model, or a training stage with one."""

    def token_scores(self, input_ids: Tensor, /) -> tuple[Tensor, Tensor]:
        """Score tokens as `HypeNetModel.token_scores` does."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """The evaluation data of one run and its metrics; every process evaluates the same and gets the
    same values."""

    run: RunConfig
    task: Callable[[int], RecallTask]
    """Number of key-value pairs -> evaluation documents."""
    heldout: Callable[[int, int], Tensor]
    """(count, seq_length) -> held-out sequences, int64 [count or fewer, seq_length + 1]."""

    def quick(
        self, model: Scoring, on_part: Callable[[int, int], None] = lambda count, total: None
    ) -> dict[str, float]:
        """Measure loss in nats per token and accuracy in % on a little held-out text, and recall in
        % over a few documents at the shortest length of the report; for the teacher before training
        and for a student in between. Returns them by the names of `training/tags.py`; `on_part` is
        called with the parts done, of two."""
        settings = self.run.eval
        loss, accuracy = heldout_loss(
            _scores(model),
            self.heldout(settings.quick_sequences, settings.seq_length),
            batch_size=settings.batch_size,
        )
        on_part(1, 2)
        multiple = min(settings.length_multiples)
        recall = recall_accuracy(
            _scores(model),
            self.task(settings.recall_pairs),
            count=settings.quick_sequences,
            seq_length=multiple * settings.seq_length,
            batch_size=max(1, settings.batch_size // multiple),
        )
        on_part(2, 2)
        return {LM_LOSS: loss, ACCURACY: accuracy, RECALL: recall}

    def selection_scores(self, model: HypeNetModel) -> dict[str, float]:
        """Measure recall accuracy and, instead of the paper's commonsense suite, next-token
        accuracy on held-out text; both in %.

        Accuracy on the text needs no download and no evaluation harness; scores of a real suite can
        be ranked by `hypenet select rank`.
        """
        settings = self.run.select
        recall = recall_accuracy(
            _scores(model),
            self.task(settings.recall_pairs),
            count=settings.recall_sequences,
            seq_length=settings.seq_length,
            batch_size=settings.batch_size,
        )
        texts = self.heldout(settings.heldout_sequences, settings.seq_length)
        _, accuracy = heldout_loss(_scores(model), texts, batch_size=settings.batch_size)
        return {"recall": recall, "commonsense": accuracy}

    def row(
        self, name: str, model: HypeNetModel, on_part: Callable[[], None] = lambda: None
    ) -> Row:
        """Return the measurements of one model for the report; `on_part` is called after each of
        num_parts() parts."""
        settings = self.run.eval
        loss, accuracy = self._loss_at(model, 1)
        on_part()
        recall = {}
        by_length = {"1": loss}
        for multiple in settings.length_multiples:
            recall[str(multiple)] = self.recall(model, multiple)
            # held-out text need not be long enough for every length
            with contextlib.suppress(DataError):
                if multiple != 1:
                    by_length[str(multiple)], _ = self._loss_at(model, multiple)
            on_part()
        return {
            "model": name,
            "heldout_loss": loss["loss"],
            "heldout_accuracy": accuracy,
            "recall": recall,
            "recall_questions": settings.recall_sequences * settings.recall_pairs,
            "loss_by_length": by_length,
        }

    def _loss_at(self, model: Scoring, multiple: int) -> tuple[Row, float]:
        """Return the held-out loss at `multiple` times the report's length, with its standard error
        over sequences and their number, and the accuracy in %. The text is the same at every
        length, cut into fewer sequences. Raises DataError when it is shorter than one."""
        settings = self.run.eval
        losses, accuracy = sequence_losses(
            _scores(model),
            self.heldout(
                max(1, settings.heldout_sequences // multiple), multiple * settings.seq_length
            ),
            batch_size=max(1, settings.batch_size // multiple),
        )
        found = {
            "loss": sum(losses) / len(losses),
            "standard_error": standard_error(losses),
            "sequences": len(losses),
        }
        return found, accuracy

    def heldout_scores(self, model: Scoring) -> tuple[float, float]:
        """Measure loss in nats per token and accuracy in % on the held-out text of the report."""
        settings = self.run.eval
        texts = self.heldout(settings.heldout_sequences, settings.seq_length)
        return heldout_loss(_scores(model), texts, batch_size=settings.batch_size)

    def recall(self, model: Scoring, multiple: int) -> float:
        """Measure recall in % at `multiple` times the length of the held-out text, as the report
        does."""
        settings = self.run.eval
        return recall_accuracy(
            _scores(model),
            self.task(settings.recall_pairs),
            count=settings.recall_sequences,
            seq_length=multiple * settings.seq_length,
            batch_size=max(1, settings.batch_size // multiple),
        )

    def stage_values(
        self, stage: StageModule, seq_length: int, names: Sequence[str]
    ) -> dict[str, float]:
        """Return the means of a training stage's quantities `names`, its loss first, on a little
        held-out text of at most `seq_length` tokens; the caller has set eval mode."""
        settings = self.run.eval
        totals = [0.0] * len(names)
        # at most the report's length, which is known to fit the held-out text
        length = min(seq_length, settings.seq_length)
        unit = self.run.parallel.sequence_unit
        texts = self.heldout(settings.quick_sequences, max(length - length % unit, unit))
        for part in texts.split(settings.batch_size):
            found = stage_values(stage, MicroBatch(part.to(device())), names)
            for index, value in enumerate(groups.all_reduce_mean(found).tolist()):
                totals[index] += value * len(part)
        return {name: total / len(texts) for name, total in zip(names, totals, strict=True)}

    def num_parts(self) -> int:
        """Return the number of calls of `on_part` in one row."""
        return 1 + len(self.run.eval.length_multiples)


def _scores(model: Scoring) -> TokenScores:
    """Return the model's token scores for ids on any device."""
    return lambda ids: model.token_scores(ids.to(device()))
