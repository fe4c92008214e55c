"""Recall accuracy: the share of questions about earlier facts of the sequence that a model answers
correctly."""

from __future__ import annotations

import torch

from megatron_hypenet.data.recall import RecallTask
from megatron_hypenet.errors import DataError
from megatron_hypenet.eval.heldout import TokenScores


def recall_accuracy(
    token_scores: TokenScores, task: RecallTask, *, count: int, seq_length: int, batch_size: int
) -> float:
    """Return accuracy in % over evaluation documents 0..count-1 of `seq_length` tokens (plus the
    last token, which is only a target).

    An answer is correct when the value is the model's most likely token. Raises DataError when
    `count` is not positive or the documents do not fit `seq_length`.
    """
    if count < 1:
        raise DataError(f"recall accuracy over {count} documents; score at least one.")
    right = total = 0
    for start in range(0, count, batch_size):
        ids, answers = task.batch(start, min(batch_size, count - start), seq_length)
        positions = torch.from_numpy(answers)
        _, correct = token_scores(torch.from_numpy(ids))
        right += int(correct.gather(1, positions.to(correct.device)).sum().item())
        total += positions.numel()
    return 100.0 * right / total
