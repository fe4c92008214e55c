"""The micro-batches of a step: their samples, and weights that make the loss a mean over real
labels."""

import pytest
import torch

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.parallel import groups
from megatron_hypenet.training.micro_batches import StepReader, step_batches
from tests.unit.engine.toy import ToyData, stage_config


@pytest.fixture(autouse=True)
def process_groups():
    groups.init_parallel(ParallelConfig())


CONFIG = stage_config(micro_batch_size=2, global_batch_size=6, seq_length=8)


def test_one_process_takes_all_samples_in_order():
    batches = step_batches(ToyData(), CONFIG, 12)
    assert len(batches) == 3 and all(batch.document_ids is None for batch in batches)
    assert torch.equal(torch.cat([batch.tokens for batch in batches]), ToyData().batch(12, 6, 8))


def test_each_data_parallel_rank_takes_its_share(monkeypatch):
    monkeypatch.setattr(groups, "data_size", lambda: 3)
    monkeypatch.setattr(groups, "data_rank", lambda: 2)
    (batch,) = step_batches(ToyData(), CONFIG, 12)
    assert torch.equal(batch.tokens, ToyData().batch(16, 2, 8))


def test_separate_documents_weigh_real_labels_alone():
    batches = step_batches(ToyData(end_of_document=3), CONFIG, 0, separate=True)
    inputs = torch.cat([batch.tokens for batch in batches])[:, :-1]
    weights = torch.cat([batch.token_weights for batch in batches])
    assert (inputs == 3).any() and torch.equal(weights == 0, inputs == 3)
    losses = torch.rand(6, 8, generator=torch.Generator().manual_seed(0))
    # every micro-batch divides by its own number of tokens, and the step takes their mean
    step = torch.stack(
        [
            (part * weight).mean()
            for part, weight in zip(losses.split(2), weights.split(2), strict=True)
        ]
    ).mean()
    torch.testing.assert_close(step, losses[inputs != 3].mean())
    assert all(batch.document_ids.dtype == torch.int32 for batch in batches)


def test_a_step_without_a_real_label_weighs_nothing():
    class Ends(ToyData):
        def batch(self, sample_start, count, seq_length):
            return torch.full((count, seq_length + 1), 3)

    assert all(
        float(batch.token_weights.sum()) == 0
        for batch in step_batches(Ends(end_of_document=3), CONFIG, 0, separate=True)
    )


def test_a_step_that_was_read_ahead_is_not_read_again():
    read = []

    class Watched(ToyData):
        def batch(self, sample_start, count, seq_length):
            read.append(sample_start)
            return super().batch(sample_start, count, seq_length)

    reader = StepReader(Watched(), stage_config(), separate=False)
    reader.read_ahead(4)
    assert read == [4, 6]
    ahead = reader.take(4)
    assert read == [4, 6] and len(ahead) == 2
    again = reader.take(4)  # forgotten once taken
    assert read == [4, 6, 4, 6]
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(ahead, again, strict=True))
    reader.read_ahead(8)
    reader.take(12)  # another step than the one that was read
    assert read[4:] == [8, 10, 12, 14]


class Answers(ToyData):
    """Labels of which every third is to be predicted."""

    def answers(self, sample_start, count, seq_length):
        rows = torch.arange(count * (seq_length + 1)).view(count, -1) + sample_start
        return rows % 3 == 0


@pytest.mark.parametrize("separate", [False, True])
def test_only_answers_weigh(separate):
    data = Answers(end_of_document=3)
    batches = step_batches(data, CONFIG, 0, separate=separate)
    counted = torch.cat([data.answers(first, 2, 8)[:, 1:] for first in (0, 2, 4)])
    within = torch.cat([batch.tokens for batch in batches])[:, :-1] != 3
    assert all((batch.document_ids is not None) == separate for batch in batches)
    losses = torch.rand(6, 8, generator=torch.Generator().manual_seed(0))
    # a loss beside a teacher needs no label of the same document
    for name, real in (
        ("token_weights", counted & within if separate else counted),
        ("answer_weights", counted),
    ):
        weights = torch.cat([getattr(batch, name) for batch in batches])
        assert torch.equal(weights != 0, real) and weights.dtype == torch.float32
        step = torch.stack(
            [
                (part * weight).mean()
                for part, weight in zip(losses.split(2), weights.split(2), strict=True)
            ]
        ).mean()
        torch.testing.assert_close(step, losses[real].mean())


def test_data_without_a_mask_has_no_weights_for_a_teacher():
    batches = step_batches(ToyData(end_of_document=3), CONFIG, 0, separate=True)
    assert all(batch.answer_weights is None for batch in batches)
