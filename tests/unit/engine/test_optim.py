"""The learning rate is a pure function of the step."""

import math

import pytest
import torch

from megatron_hypenet.engine.optim import adamw, lr_at
from tests.unit.engine.toy import stage_config


def test_warm_up_is_linear_and_ends_at_the_peak():
    config = stage_config(train_iters=100, warmup_iters=4, lr=1.0, min_lr=0.1)
    assert [lr_at(step, config) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_is_half_way_in_the_middle_and_ends_at_min_lr():
    config = stage_config(train_iters=101, warmup_iters=0, lr=1.0, min_lr=0.1)
    assert lr_at(0, config) == 1.0
    assert lr_at(50, config) == pytest.approx(0.55)
    assert lr_at(100, config) == pytest.approx(0.1) and lr_at(500, config) == pytest.approx(0.1)
    values = [lr_at(step, config) for step in range(101)]
    assert values == sorted(values, reverse=True)
    assert lr_at(25, config) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_a_longer_stage_may_keep_the_cosine_of_a_shorter_one():
    short = stage_config(train_iters=10, warmup_iters=2, lr=1.0, min_lr=0.1)
    longer = stage_config(train_iters=30, lr_decay_iters=10, warmup_iters=2, lr=1.0, min_lr=0.1)
    assert [lr_at(step, longer) for step in range(10)] == [lr_at(step, short) for step in range(10)]
    assert {lr_at(step, longer) for step in range(9, 30)} == {lr_at(9, short)}


def test_constant_stays():
    config = stage_config(
        train_iters=10, warmup_iters=2, lr=1.0, min_lr=0.1, lr_schedule="constant"
    )
    assert {lr_at(step, config) for step in range(1, 10)} == {1.0}


def test_only_warm_up_is_allowed():
    config = stage_config(train_iters=4, warmup_iters=4, lr=1.0, min_lr=0.1)
    assert [lr_at(step, config) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_weight_decay_spares_vectors():
    parameters = {
        "w": torch.nn.Parameter(torch.ones(2, 2)),
        "norm": torch.nn.Parameter(torch.ones(2)),
    }
    groups = adamw(parameters, stage_config(weight_decay=0.1)).param_groups
    assert [
        (len(group["params"]), group["params"][0].dim(), group["weight_decay"]) for group in groups
    ] == [(1, 2, 0.1), (1, 1, 0.0)]
    assert len(adamw(parameters, stage_config(weight_decay=0.0)).param_groups) == 1
    assert len(adamw({"w": parameters["w"]}, stage_config(weight_decay=0.1)).param_groups) == 1
