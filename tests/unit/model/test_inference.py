"""Scores of whole sequences: what the logits say, for any length and number of rows. Other layouts:
tests/distributed/test_parity.py."""

import pytest
import torch

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.model import inference
from megatron_hypenet.model.hypenet import build_model
from megatron_hypenet.parallel import groups
from tests.tiny import tiny_model_config

IDS = torch.randint(0, 61, (3, 13), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def model():
    return build_model(tiny_model_config(), ParallelConfig(), dtype=torch.float64, seed=1)


def test_scores_are_those_of_the_logits(model):
    logits = inference.logits(model, IDS)
    assert logits.shape == (3, 13, 61)
    nll, correct = inference.token_scores(model, IDS)
    want = -logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(nll, want.detach(), rtol=1e-10, atol=0)
    assert torch.equal(correct, logits[:, :-1].argmax(-1) == IDS[:, 1:])


def test_padding_for_a_layout_changes_nothing(model, monkeypatch):
    want = inference.logits(model, IDS)
    monkeypatch.setattr(
        model,
        "parallel",
        ParallelConfig(
            context_parallel_size=4, tensor_model_parallel_size=2, sequence_parallel=True
        ),
    )
    assert inference._padded(model, IDS).shape == (3, 16)
    torch.testing.assert_close(inference.logits(model, IDS), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("rows", "stages", "count"), [(1, 4, 1), (8, 2, 4), (6, 2, 3), (7, 4, 7), (9, 2, 3)]
)
def test_rows_travel_in_equal_micro_batches(monkeypatch, rows, stages, count):
    monkeypatch.setattr(groups, "pipeline_stage", lambda: (0, stages))
    assert inference._num_micro_batches(rows) == count
