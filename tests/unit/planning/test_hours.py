"""Hours follow from work, GPUs and the time of a step."""

import pytest

from megatron_hypenet.config.layout import Layout
from megatron_hypenet.config.loader import load_model_config, load_run_config
from megatron_hypenet.planning.eta import FORWARD_USE
from megatron_hypenet.planning.hours import hours_of
from megatron_hypenet.planning.layout_search import step_times, teacher_and_student
from megatron_hypenet.planning.machine import H100
from megatron_hypenet.planning.planned_work import Planned, planned_work

SHOWN = ("align", "select", "distill", "finetune", "report")


@pytest.fixture
def hypenet_2b(repo_root):
    def layout(gpus, *words):
        run = load_run_config(
            repo_root / "configs/run/distill_2b.yaml", ["teacher=T", "data=D", *words]
        )
        return Layout(load_model_config(repo_root / "configs/model/hypenet_2b.yaml"), run, gpus)

    return layout


def test_stages_take_their_steps_and_the_rest_its_work(hypenet_2b):
    layout = hypenet_2b(8)
    planned = {step: Planned(flops=3600e12) for step in SHOWN}
    planned["export"] = Planned()
    found = {row.step: row for row in hours_of(planned, layout, H100)}
    assert tuple(found) == SHOWN
    times = step_times(layout, H100)
    distill = layout.run.distill.train_iters * times["distill"].total / 3600
    assert found["distill"].hours == pytest.approx(distill)
    assert found["distill"].gpu_hours == pytest.approx(8 * distill)
    assert found["report"].gpu_hours == pytest.approx(1e12 / (H100.peak * FORWARD_USE))
    evaluated = Planned(flops=3600e12, evaluations=2, evaluation_flops=1800e12)
    (row,) = hours_of({"distill": evaluated}, layout, H100)
    more = 1e12 / (H100.peak * FORWARD_USE)
    assert row.gpu_hours == pytest.approx(8 * distill + more)


def test_speed_and_mfu_are_those_of_the_step(hypenet_2b):
    """README.md states 77,205 tokens/s and 42.9% at 24 x 512 on one H100, 31,861 and 48.9% at 12 x
    512."""
    layout = hypenet_2b(1, "align.micro_batch_size=24", "align.global_batch_size=24")
    layout = layout.changed({"distill.global_batch_size": 12, "distill.recompute": "none"})
    teacher, _ = teacher_and_student(layout.model, layout.run.align.spec)
    work = planned_work(layout.run, teacher, SHOWN)
    found = {row.step: row for row in hours_of(work, layout, H100)}
    assert found["align"].tokens_per_second == pytest.approx(77_205, rel=0.1)
    assert found["align"].mfu == pytest.approx(0.429, rel=0.1)
    assert found["distill"].tokens_per_second == pytest.approx(31_861, rel=0.1)
    assert found["distill"].mfu == pytest.approx(0.489, rel=0.1)


def test_attention_of_longer_sequences_takes_longer(hypenet_2b):
    """A quarter of the student's layers keeps softmax attention, and its work counts."""
    work = []
    for more in ([], ["finetune.seq_length=131072", "finetune.global_batch_size=16"]):
        layout = hypenet_2b(8, *more)
        teacher, _ = teacher_and_student(layout.model, layout.run.align.spec)
        work.append(planned_work(layout.run, teacher, SHOWN)["finetune"].flops)
    assert work[1] > 1.5 * work[0]  # of as many tokens
