"""The data that evaluations read, and how much of it."""

import dataclasses

import pytest
import torch

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.errors import DataError
from megatron_hypenet.halo import evaluation as module
from megatron_hypenet.halo.evaluation import Measure
from megatron_hypenet.parallel import groups
from tests.unit.halo.test_run_folder import config


class Model:
    """Stands in for a model: measurements are recorded, not made."""

    @staticmethod
    def token_scores(ids):
        """Return what a model would say of each token."""
        return ids, ids


@pytest.fixture
def calls(monkeypatch):
    seen = []

    def recall(token_scores, task, **kwargs):
        assert torch.equal(token_scores(torch.ones(1))[0], torch.ones(1))
        seen.append((task, kwargs))
        return 10.0 * len(seen)

    def loss(token_scores, texts, *, batch_size):
        seen.append(("heldout", texts.shape, batch_size))
        return 2.5, 40.0

    monkeypatch.setattr(module, "recall_accuracy", recall)

    def losses(token_scores, texts, *, batch_size):
        seen.append(("losses", texts.shape, batch_size))
        if texts.shape[1] > 100:
            raise DataError("the text is too short")
        return [2.0, 3.0], 40.0

    monkeypatch.setattr(module, "heldout_loss", loss)
    monkeypatch.setattr(module, "sequence_losses", losses)
    return seen


@pytest.fixture
def measure(tmp_path):
    run = config(
        tmp_path,
        eval={
            "seq_length": 16,
            "length_multiples": [1, 4],
            "recall_sequences": 6,
            "recall_pairs": 3,
            "heldout_sequences": 5,
            "batch_size": 2,
        },
        select={
            "seq_length": 8,
            "recall_sequences": 7,
            "recall_pairs": 2,
            "heldout_sequences": 9,
            "batch_size": 3,
        },
    )
    return Measure(
        run=run,
        task=lambda pairs: f"task of {pairs}",
        heldout=lambda count, length: torch.zeros(count, length + 1),
    )


def test_a_row_measures_text_and_recall_at_every_length(measure, calls):
    parts = []
    row = measure.row("student", Model, lambda: parts.append(1))
    assert row == {
        "model": "student",
        "heldout_loss": 2.5,
        "heldout_accuracy": 40.0,
        "recall": {"1": 20.0, "4": 30.0},
        "recall_questions": 18,
        "loss_by_length": {
            name: {"loss": 2.5, "standard_error": 0.5, "sequences": 2} for name in ("1", "4")
        },
    }
    assert calls == [
        ("losses", (5, 17), 2),
        ("task of 3", {"count": 6, "seq_length": 16, "batch_size": 2}),
        ("task of 3", {"count": 6, "seq_length": 64, "batch_size": 1}),
        ("losses", (1, 65), 1),
    ]
    assert len(parts) == measure.num_parts() == 3


def test_a_length_that_the_text_does_not_reach_has_no_loss(measure, calls):
    run = measure.run
    longer = run.eval.model_copy(update={"length_multiples": (1, 8)})
    far = dataclasses.replace(measure, run=run.model_copy(update={"eval": longer}))
    row = far.row("student", Model)
    assert list(row["loss_by_length"]) == ["1"] and list(row["recall"]) == ["1", "8"]


def test_selection_scores_recall_and_text(measure, calls):
    assert measure.selection_scores(Model) == {"recall": 10.0, "commonsense": 40.0}
    assert calls == [
        ("task of 2", {"count": 7, "seq_length": 8, "batch_size": 3}),
        ("heldout", (9, 9), 3),
    ]


def test_a_stage_is_measured_by_its_own_quantities_over_all_sequences(measure):
    groups.init_parallel(ParallelConfig())
    shapes = []

    def stage(batch):
        shapes.append(tuple(batch.tokens.shape))
        loss = torch.tensor(float(len(shapes)))
        return loss, {"train/kl": 10 * loss, "train/other": loss}

    few = dataclasses.replace(
        measure, heldout=lambda count, length: torch.zeros(min(count, 5), length + 1)
    )
    mean = (2 * 1 + 2 * 2 + 1 * 3) / 5
    found = few.stage_values(stage, 12, ("reverse-kl", "kl"))
    assert found == pytest.approx({"reverse-kl": mean, "kl": 10 * mean})
    assert shapes == [(2, 13), (2, 13), (1, 13)]
    measure.stage_values(stage, 99, ("loss",))
    assert shapes[3:] == [(2, 17)] * 8, "not longer than what the report reads"


def test_a_quick_look_is_small(measure, calls):
    assert measure.quick(Model) == {"lm-loss": 2.5, "accuracy": 40.0, "recall": 20.0}
    assert calls == [
        ("heldout", (16, 17), 2),
        ("task of 3", {"count": 16, "seq_length": 16, "batch_size": 2}),
    ]
