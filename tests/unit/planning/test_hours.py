"""Hours follow from work, GPUs and their peak."""

import pytest

from megatron_hypenet.config.loader import load_model_config, load_run_config
from megatron_hypenet.planning.eta import Planned, planned_work
from megatron_hypenet.planning.hours import hours_of
from megatron_hypenet.planning.layout_search import teacher_and_student

SHOWN = ("align", "select", "distill", "finetune", "report")


def test_hours_are_work_over_what_the_gpus_reach():
    planned = {step: Planned(flops=3600e12) for step in SHOWN}
    planned["export"] = Planned()
    planned["distill"] = Planned(flops=3600e12, evaluations=2, evaluation_flops=1800e12)
    found = {row.step: row for row in hours_of(planned, gpus=8, peak=100e12)}
    assert tuple(found) == SHOWN
    assert found["align"].gpu_hours == pytest.approx(1 / (100 * 0.40))
    assert found["align"].hours == pytest.approx(found["align"].gpu_hours / 8)
    assert found["distill"].gpu_hours == pytest.approx(2 / (100 * 0.49))
    again = hours_of(planned, gpus=8, peak=100e12, recompute={"finetune": "full"})
    both = {row.step: row for row in again}
    assert both["finetune"].hours == pytest.approx(4 / 3 * found["finetune"].hours)
    assert both["distill"] == found["distill"]


def test_stages_of_hypenet_2b_take_what_was_measured(repo_root):
    """Tokens/s on one H100: tools/bench/results/step_h100_202611.md, stage 1 at 24 x 512."""
    words = ["teacher=T", "data=D", "align.eval_interval=20000"]
    run = load_run_config(repo_root / "configs/run/distill_2b.yaml", words)
    shape = load_model_config(repo_root / "configs/model/hypenet_2b.yaml")
    teacher, _ = teacher_and_student(shape, run.align.spec)
    found = {
        row.step: row for row in hours_of(planned_work(run, teacher, SHOWN), gpus=1, peak=989e12)
    }
    measured = 20_000 * 32 * 512 / 77_205 / 3600
    assert found["align"].gpu_hours == pytest.approx(measured, rel=0.15)
    distilled = run.distill.train_iters * run.distill.tokens_per_step / 31_861 / 3600
    assert found["distill"].gpu_hours == pytest.approx(distilled, rel=0.15)
    finetuned = run.finetune.train_iters * run.finetune.tokens_per_step / 40_066 / 3600
    assert found["finetune"].gpu_hours == pytest.approx(finetuned, rel=0.05)


def test_attention_of_longer_sequences_takes_longer(repo_root):
    """A quarter of the student's layers keeps softmax attention, and its work counts."""
    words = ["teacher=T", "data=D"]
    path = repo_root / "configs/run/distill_2b.yaml"
    shape = load_model_config(repo_root / "configs/model/hypenet_2b.yaml")
    work = []
    for more in ([], ["finetune.seq_length=131072", "finetune.global_batch_size=16"]):
        run = load_run_config(path, [*words, *more])
        teacher, _ = teacher_and_student(shape, run.align.spec)
        work.append(planned_work(run, teacher, SHOWN)["finetune"].flops)
    assert work[1] > 1.5 * work[0]  # of as many tokens
