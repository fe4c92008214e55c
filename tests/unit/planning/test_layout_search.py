"""Layouts that fit: they obey the rules, fit, and the fastest by estimate comes first."""

import pytest

from megatron_hypenet.config.checks import layout_problems
from megatron_hypenet.config.layout import CONTEXT, PIPELINE, TENSOR, ZERO, Layout
from megatron_hypenet.config.loader import load_model_config, load_run_config
from megatron_hypenet.config.mixers import default_mixer
from megatron_hypenet.planning.layout_search import (
    fits,
    fullest,
    needs,
    scaled_batches,
    step_times,
    teacher_and_student,
)
from megatron_hypenet.planning.machine import H100

GIB = 2**30


@pytest.fixture
def layout(repo_root):
    def of(model, world_size, *words):
        shape = load_model_config(repo_root / "configs" / "model" / f"{model}.yaml")
        run = load_run_config(
            repo_root / "configs" / "run" / "distill_2b.yaml", ["teacher=T", "data=D", *words]
        )
        return Layout(shape, run, world_size)

    return of


def test_both_models_come_from_either_shape(layout):
    student = layout("hypenet_2b", 8).model
    teacher, same = teacher_and_student(student, default_mixer())
    assert same == student and teacher.is_teacher and teacher.num_layers == student.num_layers
    again, made = teacher_and_student(teacher, default_mixer())
    assert (
        again == teacher
        and len(made.attention_layers) == 7
        and not made.attn_use_rope
        and made.attn_use_output_gate
    )


def test_every_stage_is_measured_where_it_needs_most(layout):
    found = needs(layout("hypenet_2b", 8, "parallel.pipeline_model_parallel_size=4"))
    assert [need.stage for need in found] == ["align", "distill", "finetune"]
    assert fullest(found).memory.needed == max(need.memory.needed for need in found)
    assert found[2].pipeline_stage == 0, "the first stage keeps most micro-batches"


def test_what_is_offered_obeys_the_rules_and_fits(layout):
    asked = layout("hypenet_9b", 8)
    found = fits(asked, 79.1 * GIB, H100)
    assert found and fullest(needs(asked)).memory.needed > 79.1 * GIB
    assert [fit.hours for fit in found] == sorted(fit.hours for fit in found)
    for fit in found:
        changed = asked.changed(fit.change)
        assert not layout_problems(changed)
        assert fullest(needs(changed)).memory.needed == fit.fullest.memory.needed <= 79.1 * GIB
    first = asked.changed(found[0].change)
    times = step_times(first, H100)
    seconds = sum(first.run.stage(name).train_iters * time.total for name, time in times.items())
    assert found[0].hours == pytest.approx(seconds / 3600)


def test_batches_grow_with_the_gpus_and_steps_shrink(layout):
    asked = layout("hypenet_2b", 1024)
    scaled = scaled_batches(asked).run
    for name in ("align", "distill", "finetune"):
        stage, before = scaled.stage(name), asked.run.stage(name)
        assert stage.global_batch_size == 1024 * stage.micro_batch_size
        tokens = stage.train_iters * stage.tokens_per_step
        assert tokens == pytest.approx(before.train_iters * before.tokens_per_step, rel=0.01)
    few = layout("hypenet_2b", 8)
    assert scaled_batches(few).run == few.run, "these batches are large enough"


def test_the_plainest_layout_comes_first(layout):
    first = fits(layout("hypenet_2b", 8), 79.1 * GIB, H100)[0].change
    assert (first[TENSOR], first[PIPELINE], first[CONTEXT], first[ZERO]) == (1, 1, 1, 1)
    assert first["distill.recompute"] == first["finetune.recompute"] == "none"
    assert fits(layout("hypenet_9b", 1), 79.1 * GIB, H100) == []
