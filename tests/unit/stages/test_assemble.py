"""Which tensor of a student comes from where."""

import pytest

from megatron_hypenet.checkpoint.shards import tensor_pieces
from megatron_hypenet.config.mixers import default_mixer
from megatron_hypenet.errors import CheckpointError
from megatron_hypenet.stages.aligned_mixers import AlignedMixers
from megatron_hypenet.stages.assemble import mixer_layer, plan_assembly
from tests.unit.stages.conftest import STUDENT, build


def stored_names(module):
    """Return canonical tensor names of a module's checkpoint: a fused projection counts by
    section."""
    return [
        piece.key
        for entry in module.sharded_state_dict(prefix="").values()
        for piece in tensor_pieces(entry)
    ]


def test_the_plan_covers_the_student_exactly(teacher):
    aligned = AlignedMixers.from_teacher(teacher, default_mixer(), seed=0)
    plan = plan_assembly(STUDENT, stored_names(teacher), stored_names(aligned))
    assert sorted(plan.names) == sorted(stored_names(build(STUDENT)))
    assert list(plan.fresh) == ["decoder.layers.1.self_attention.linear_in.weight.gate"]
    assert {mixer_layer(name) for name in plan.from_aligned} == {0, 2}
    assert {mixer_layer(name) for name in plan.from_teacher} == {None, 1}


def test_missing_mixers_are_named(teacher):
    aligned = [
        name
        for name in stored_names(AlignedMixers.from_teacher(teacher, default_mixer(), seed=0))
        if mixer_layer(name) != 2
    ]
    with pytest.raises(CheckpointError, match="aligned mixers hold no mixer tensors of layers 2"):
        plan_assembly(STUDENT, stored_names(teacher), aligned)
    with pytest.raises(CheckpointError, match="teacher hold no mixer tensors of layers 1"):
        plan_assembly(
            STUDENT,
            aligned[:0],
            stored_names(AlignedMixers.from_teacher(teacher, default_mixer(), seed=0)),
        )
