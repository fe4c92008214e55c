import pytest
import torch

from megatron_hypenet.errors import DataError
from megatron_hypenet.eval.heldout import heldout_loss, sequence_losses


def scores(ids):
    nll = ids[:, 1:].float()
    return nll, ids[:, 1:] > 2


def test_mean_over_all_tokens_whatever_the_batch():
    texts = torch.tensor([[0, 1, 2], [0, 3, 4], [0, 5, 6]])
    for batch_size in (1, 2, 5):
        loss, accuracy = heldout_loss(scores, texts, batch_size=batch_size)
        assert loss == 3.5 and accuracy == pytest.approx(100 * 4 / 6)


def test_every_sequence_has_its_own_loss():
    losses, accuracy = sequence_losses(scores, torch.tensor([[0, 1, 2], [0, 3, 4]]), batch_size=1)
    assert losses == [1.5, 3.5] and accuracy == 50.0


def test_nothing_to_score():
    with pytest.raises(DataError, match=r"\[0, 8\]"):
        heldout_loss(scores, torch.zeros(0, 8, dtype=torch.int64), batch_size=1)
