"""Pipeline stages are balanced by what a HALO stage computes on them, and what they hold is checked
and shown."""

import pytest

from megatron_hypenet.config.mixers import default_mixer
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.errors import LayoutError
from megatron_hypenet.parallel import groups
from megatron_hypenet.planning.layer_placement import check_placement, placed, placement_table
from tests.tiny import tiny_model_config, tiny_teacher_config
from tests.unit.engine.toy import stage_config

TEACHER = tiny_teacher_config(8, vocab_size=1024)
STUDENT = tiny_model_config(("lightning_attn",) * 7 + ("attn",), vocab_size=1024)


def layout(name, teacher=TEACHER, **changes):
    parallel = ParallelConfig(pipeline_model_parallel_size=2, **changes)
    student = TEACHER.converted(default_mixer()) if name == "align" else STUDENT
    return placed(name, stage_config(seq_length=64), parallel, teacher, student).pipeline_layout


def test_alignment_has_no_head_and_the_other_stages_have():
    assert layout("align") == (4, 4)
    assert layout("distill")[0] > 4 and layout("finetune", teacher=None)[0] > 4


def test_what_the_user_wrote_stays():
    assert layout("align", pipeline_layout=(7, 1)) == (7, 1)
    alone = ParallelConfig()
    assert placed("align", stage_config(), alone, TEACHER, STUDENT) is alone


def test_a_layer_that_is_missing_or_held_twice_is_found(monkeypatch):
    class Model:
        model_config = STUDENT
        layout = (4, 4)

        layers = ()

    for held in ([[0, 1, 2, 3], [3, 4, 5, 6, 7]], [[0, 1, 2], [4, 5, 6, 7]]):
        monkeypatch.setattr(groups, "gather_over_pipeline", lambda mine, held=held: held)
        with pytest.raises(LayoutError, match="not 0 to 7 once each"):
            check_placement(Model())
    monkeypatch.setattr(groups, "gather_over_pipeline", lambda mine: [[0, 1, 2, 3], [4, 5, 6, 7]])
    check_placement(Model())
    monkeypatch.setattr(groups, "gather_over_pipeline", lambda mine: [[0, 1, 4, 5], [2, 3, 6, 7]])
    check_placement(Model())  # two chunks on each stage


def test_the_table_names_layers_and_mixers():
    lines = placement_table((5, 3), STUDENT, 2).splitlines()
    assert lines[0].strip() == "pipeline stage 0: layers 0-4 (5 lightning_attn)"
    assert lines[1].strip() == "pipeline stage 1: layers 5-7 (2 lightning_attn, 1 attn)"
    lines = placement_table((3, 2, 2, 1), STUDENT, 2).splitlines()
    assert lines[1].strip() == "pipeline stage 1: layers 3-4, 7-7 (2 lightning_attn, 1 attn)"


def test_chunks_of_a_stage_are_balanced_too():
    found = layout("distill", virtual_pipeline_model_parallel_size=2)
    assert len(found) == 4 and sum(found) == 8 and found[-1] == 1
    assert layout("align", virtual_pipeline_model_parallel_size=2) == (2, 2, 2, 2)
