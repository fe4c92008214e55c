"""Converting one layer, scoring, converting back."""

import pytest
import torch

from megatron_hypenet.config.mixers import default_mixer
from megatron_hypenet.stages.aligned_mixers import AlignedMixers
from megatron_hypenet.stages.selection.layer_sweep import score_layers, swapped

METRICS = ("recall", "commonsense")


@pytest.fixture
def mixers(teacher):
    return AlignedMixers.from_teacher(teacher, default_mixer(), seed=3)


def test_a_swap_changes_one_layer_and_is_undone(teacher, mixers, batch):
    before = teacher(batch.tokens)
    attention = teacher.mixer(1)
    with swapped(teacher, 1, mixers):
        assert teacher.mixer(1) is mixers.of_layer(1) and teacher.mixer(0) is not mixers.of_layer(0)
        assert not torch.equal(teacher(batch.tokens), before)
    assert teacher.mixer(1) is attention
    assert torch.equal(teacher(batch.tokens), before)


def test_a_swap_is_undone_after_an_error(teacher, mixers):
    attention = teacher.mixer(0)
    with pytest.raises(RuntimeError), swapped(teacher, 0, mixers):
        raise RuntimeError("evaluation failed")
    assert teacher.mixer(0) is attention


def recorder(teacher, mixers, seen):
    """Make an evaluation that notes which layers are swapped and gives a score by it."""

    def evaluate():
        state = tuple(layer for layer, mixer in mixers.items() if teacher.mixer(layer) is mixer)
        seen.append(state)
        return {"recall": 90.0 - sum(state), "commonsense": 50.0}

    return evaluate


def test_every_layer_is_scored_alone_after_the_baseline(teacher, mixers):
    seen, saved = [], []
    result = score_layers(
        teacher,
        mixers,
        recorder(teacher, mixers, seen),
        metrics=METRICS,
        on_scored=lambda payload: saved.append(len(payload["layers"])),
    )
    assert seen == [(), (0,), (1,), (2,)]
    assert saved == [0, 1, 2, 3]
    assert result["num_layers"] == 3 and result["baseline"] == {"recall": 90.0, "commonsense": 50.0}
    assert result["layers"]["2"] == {"recall": 88.0, "commonsense": 50.0}


def test_what_is_known_is_not_measured_again(teacher, mixers):
    seen = []
    known = {
        "baseline": {"recall": 1.0, "commonsense": 2.0},
        "layers": {"0": {"recall": 3.0, "commonsense": 4.0}},
    }
    result = score_layers(
        teacher, mixers, recorder(teacher, mixers, seen), metrics=METRICS, known=known
    )
    assert seen == [(1,), (2,)]
    assert result["baseline"] == known["baseline"] and result["layers"]["0"] == known["layers"]["0"]
