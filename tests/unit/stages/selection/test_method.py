"""The registry of selection methods, and what every method has."""

import pytest

from megatron_hypenet.config.mixers import default_mixer
from megatron_hypenet.config.selection import SELECTION_METHODS, SelectConfig
from megatron_hypenet.stages.selection.method import (
    HELDOUT,
    RECALL,
    TRAINING,
    RankSettings,
    selection_method,
)
from megatron_hypenet.stages.selection.scores import parse_scores
from tests.tiny import tiny_teacher_config


@pytest.mark.parametrize("name", SELECTION_METHODS)
def test_a_method_registers_under_its_name(name):
    method = selection_method(name)
    assert method.name == name and method is selection_method(name)
    assert method.reads <= {RECALL, HELDOUT, TRAINING}
    assert method.about.endswith(".") and method.axis


def test_an_unknown_method_names_the_known_ones():
    with pytest.raises(KeyError, match="halo, kl, gates, uniform"):
        selection_method("best")


@pytest.mark.parametrize("name", SELECTION_METHODS)
def test_every_method_ranks_its_own_scores(name):
    method = selection_method(name)
    layers = {str(layer): dict.fromkeys(method.metrics, layer / 4) for layer in range(4)}
    scores = parse_scores({"method": name, "layers": layers})
    found = method.importance(scores, RankSettings(num_attention=2))
    assert len(found) == 4 and all(0.0 <= value <= 50.0 for value in found)


def test_operations_follow_what_is_read():
    teacher = tiny_teacher_config(8)
    converted = teacher.converted(default_mixer())

    def flops(method, **settings):
        return selection_method(method).flops(SelectConfig(**settings), teacher, converted)

    assert flops("uniform") == 0.0
    # the same passes, over recall documents too
    halo = flops("halo", recall_sequences=30, heldout_sequences=10)
    assert halo == pytest.approx(4 * flops("kl", heldout_sequences=10))
    assert flops("gates", gates={"train_iters": 20}) == 2 * flops(
        "gates", gates={"train_iters": 10}
    )
    # more than the four forward passes of its parts without the mixers, less than training
    passes = flops("gates", gates={"train_iters": 9, "global_batch_size": 1}) / flops(
        "kl", heldout_sequences=1
    )
    assert 3.0 < passes < 4.5
