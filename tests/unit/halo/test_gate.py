"""What a gate measures, and when it stops a run; test_actions.py has one inside a run."""

from types import SimpleNamespace

import pytest

from megatron_hypenet.config.schema import GateConfig
from megatron_hypenet.errors import QualityError
from megatron_hypenet.halo import gate


class Measure:
    """Losses 3.0 of the student and 2.0 of the teacher, recall 60 % at length 1 and 30 at 2."""

    run = SimpleNamespace(eval=SimpleNamespace(seq_length=512))

    def heldout_scores(self, model):
        return {"student": 3.0, "teacher": 2.0, "broken": float("nan")}[model], 0.0

    def recall(self, model, multiple):
        assert model != "teacher"
        return {1: 60.0, 2: 30.0}[multiple]


def checked(student="student", **bounds):
    """Check the bounds after distill."""
    return gate.check(
        "distill",
        GateConfig(**bounds),
        Measure(),
        teacher=lambda: "teacher",
        student=lambda: student,
        kept="runs/x/distill",
    )


def test_what_was_measured_is_recorded():
    assert checked(max_loss_ratio=1.6, min_recall=60.0) == {
        "heldout_loss": 3.0,
        "teacher_loss": 2.0,
        "loss_ratio": 1.5,
        "recall": 60.0,
    }
    # what has no bound is not measured
    assert checked(min_recall=20.0, recall_multiple=2) == {"recall": 30.0}


@pytest.mark.parametrize(
    ("bounds", "says"),
    [
        ({"max_loss_ratio": 1.4}, "3.0000 nats per token, 1.500 times the teacher's 2.0000"),
        ({"min_recall": 60.1}, "recall at 512 tokens is 60.0 %"),
        ({"min_recall": 60.0, "recall_multiple": 2}, "recall at 1,024 tokens is 30.0 %"),
        ({"student": "broken", "max_loss_ratio": 9.0}, "its held-out loss is nan"),
    ],
)
def test_a_student_below_a_bound_stops_the_run(bounds, says):
    with pytest.raises(QualityError, match="the student after distill is below its gate") as caught:
        checked(**bounds)
    text = str(caught.value)
    assert says in text and "--redo-from distill" in text and "runs/x/distill" in text
    assert caught.value.exit_code == 9


def test_both_bounds_are_named():
    with pytest.raises(QualityError) as caught:
        checked(max_loss_ratio=1.0, min_recall=99.0)
    assert "eval.gate.distill.max_loss_ratio=1; " not in str(caught.value)
    assert "min_recall=99; and its held-out loss" in str(caught.value)
