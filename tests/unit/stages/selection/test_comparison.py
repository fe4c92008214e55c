"""KL between a model and itself after a change: filled rows and positions that do not count."""

import pytest
import torch

from megatron_hypenet.stages.selection.comparison import Comparison, Rows
from megatron_hypenet.stages.selection.layer_sweep import swapped


def kl_of(teacher, mixers, tokens, predicted, micro_batch_size):
    comparison = Comparison(teacher)
    reference = comparison.reference(Rows(tokens, predicted, micro_batch_size))
    with swapped(teacher, 1, mixers):
        return comparison.kl(reference)


def test_rows_are_means_over_the_positions_that_count(teacher, mixers):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 50, (3, 9), generator=generator)
    predicted = torch.rand(3, 9, generator=generator) < 0.4
    predicted[2] = False  # no position of this row counts
    with torch.no_grad():
        before = torch.log_softmax(teacher(tokens), -1)
        with swapped(teacher, 1, mixers):
            after = torch.log_softmax(teacher(tokens), -1)
    kl = (before.exp() * (before - after)).sum(-1)
    want = sum(float(kl[row][predicted[row]].mean()) for row in range(2))
    for size in (1, 2, 3, 5):
        got = kl_of(teacher, mixers, tokens, predicted, size)
        assert got == pytest.approx(want, rel=1e-12), size


def test_an_unchanged_model_has_no_distance_and_no_trained_weight(teacher):
    comparison = Comparison(teacher)
    tokens = torch.arange(10).view(2, 5)
    rows = Rows(tokens, torch.ones_like(tokens, dtype=torch.bool), 2)
    assert comparison.kl(comparison.reference(rows)) == pytest.approx(0.0, abs=1e-14)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.training
