import numpy as np
import pytest
import torch

from megatron_hypenet.data.recall import RecallTask, RecallVocabulary
from megatron_hypenet.errors import DataError
from megatron_hypenet.eval.recall import recall_accuracy

VOCABULARY = RecallVocabulary(
    words=tuple(range(10, 90)), opening=(1,), separator=(2,), closing=(3,)
)
TASK = RecallTask(VOCABULARY, np.full(500, 9), seed=1, num_pairs=4)


def remembers(ids, horizon=10**9):
    """Make a model that predicts what was said about the same key at most `horizon` tokens ago."""
    correct = torch.zeros(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool)
    for row, tokens in enumerate(ids.tolist()):
        for p in range(1, len(tokens) - 1):
            correct[row, p] = any(
                tokens[q - 1 : q + 2] == tokens[p - 1 : p + 2]
                for q in range(max(1, p - horizon), p)
            )
    return torch.zeros(correct.shape), correct


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_perfect_and_blind(batch_size):
    arguments = {"count": 5, "seq_length": 100, "batch_size": batch_size}
    assert recall_accuracy(remembers, TASK, **arguments) == 100.0
    assert recall_accuracy(lambda ids: remembers(ids, 0), TASK, **arguments) == 0.0


def test_short_memory_fails_at_length():
    near, far = (
        recall_accuracy(
            lambda ids: remembers(ids, 90), TASK, count=5, seq_length=length, batch_size=2
        )
        for length in (100, 400)
    )
    assert near > 90 and far < 30


def test_no_documents():
    with pytest.raises(DataError, match="at least one"):
        recall_accuracy(remembers, TASK, count=0, seq_length=100, batch_size=1)
