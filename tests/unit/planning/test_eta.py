"""Planned work and the time that is left."""

import pytest

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.planning.eta import Clock, planned_work
from tests.unit.halo.test_run_folder import STAGE, config

TEACHER = ModelConfig(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=100,
    share_embeddings_and_output_weights=True,
    mixer_types=("attn",) * 4,
    attn_use_rope=True,
    attn_use_output_gate=False,
)


STEPS = ("data", "align", "select", "a task of its own", "distill", "finetune", "report")


def test_work_grows_with_what_is_asked(tmp_path):
    base = planned_work(config(tmp_path), TEACHER, STEPS)
    longer = planned_work(config(tmp_path, distill={**STAGE, "train_iters": 4}), TEACHER, STEPS)
    assert longer["distill"] == 2 * base["distill"] and longer["align"] == base["align"]
    shorter = planned_work(config(tmp_path, eval={"length_multiples": [1]}), TEACHER, STEPS)
    assert shorter["report"] < base["report"] and shorter["select"] == base["select"]
    assert tuple(base) == STEPS and all(value > 0 for value in base.values())


def test_distillation_costs_more_per_token_than_finetuning(tmp_path):
    work = planned_work(config(tmp_path), TEACHER, STEPS)
    assert work["distill"] > work["finetune"]


def test_time_left_follows_the_measured_speed():
    time = [0.0]
    clock = Clock({"a": 1.0, "b": 2.0, "c": 5.0}, now=lambda: time[0])
    assert clock.eta() is None and clock.fraction() == 0
    clock.skip("c")
    time[0] = 10.0
    clock.finish("a")
    assert clock.fraction() == pytest.approx(1 / 3) and clock.eta() == pytest.approx(20.0)
    clock.progress("b", 1, 2)
    time[0] = 30.0
    assert clock.fraction() == pytest.approx(2 / 3) and clock.eta() == pytest.approx(15.0)
    clock.finish("b")
    assert clock.fraction() == 1 and clock.eta() == 0 and clock.elapsed() == 30.0


def test_what_an_earlier_start_did_is_no_speed_of_this_one():
    time = [0.0]
    clock = Clock({"a": 10.0, "b": 10.0}, now=lambda: time[0])
    clock.progress("a", 8, 10)  # goes on after the seventh part
    time[0] = 2.0
    clock.progress("a", 9, 10)
    # 2 units of work in 2 seconds, 11 are left
    assert clock.fraction() == pytest.approx(0.45) and clock.eta() == pytest.approx(11.0)
    time[0] = 3.0
    clock.finish("a")
    assert clock.fraction() == 0.5 and clock.eta() == pytest.approx(10.0)


def test_a_run_of_skipped_steps_is_finished():
    clock = Clock({"a": 1.0})
    clock.skip("a")
    assert clock.fraction() == 1.0
