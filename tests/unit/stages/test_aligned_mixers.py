"""New mixers start from the attention beside them."""

import pytest
import torch

from megatron_hypenet.config.mixers import default_mixer
from megatron_hypenet.stages.aligned_mixers import AlignedMixers


@pytest.fixture
def mixers(teacher):
    return AlignedMixers.from_teacher(teacher, default_mixer(), seed=3)


def test_mixers_start_from_their_layers_attention(teacher, mixers):
    for layer, mixer in mixers.items():
        attention = teacher.mixer(layer)
        assert torch.equal(mixer.section_weight("q"), attention.section_weight("q"))
        assert torch.equal(mixer.linear_proj.weight, attention.linear_proj.weight)
        assert torch.equal(mixer.o_norm.weight, torch.ones_like(mixer.o_norm.weight))
    again = AlignedMixers.from_teacher(teacher, default_mixer(), seed=3)
    other = AlignedMixers.from_teacher(teacher, default_mixer(), seed=4)
    assert torch.equal(
        again.of_layer(1).section_weight("gate"), mixers.of_layer(1).section_weight("gate")
    )
    assert not torch.equal(
        other.of_layer(1).section_weight("gate"), mixers.of_layer(1).section_weight("gate")
    )
