"""The stage contract: what trains is registered, what is frozen is not."""

import pytest
import torch
from torch import nn

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.parallel import groups
from megatron_hypenet.stages.base import (
    MicroBatch,
    StageModule,
    finite_or_nan,
    local_tokens,
)
from tests.unit.stages.conftest import STUDENT


class Stage(StageModule):
    name = "stage"
    layout = (3,)

    def forward(self, batch):
        return self.layer(batch.tokens), {}

    def flops_per_token(self, config):
        return 1.0

    def sharded_state_dict(self, prefix=""):
        return {}


def test_a_stage_must_say_what_its_loss_is_and_what_it_hands_on():
    with pytest.raises(TypeError, match="forward.*sharded_state_dict"):
        StageModule(STUDENT)


def test_a_frozen_module_is_usable_but_not_part_of_the_stage():
    stage = Stage(STUDENT)
    stage.layer = nn.Linear(2, 3)
    stage.attach_frozen("teacher", nn.Linear(4, 5))
    assert stage.teacher(torch.ones(1, 4)).shape == (1, 5)
    assert (
        set(dict(stage.named_parameters()))
        == {"layer.weight", "layer.bias"}
        == set(stage.state_dict())
    )
    assert not any(parameter.requires_grad for parameter in stage.teacher.parameters())
    stage.train()
    assert not stage.teacher.training


def test_frozen_parameters_do_not_train():
    stage = Stage(STUDENT)
    stage.layer = nn.Linear(2, 3)
    stage.layer.bias.requires_grad_(False)
    assert list(stage.trainable_parameters()) == ["layer.weight"]


def test_labels_are_the_tokens_after_the_inputs():
    groups.init_parallel(ParallelConfig())
    tokens = local_tokens(MicroBatch(torch.arange(8).view(2, 4)))
    assert tokens.inputs.tolist() == [[0, 1, 2], [4, 5, 6]]
    assert tokens.labels.tolist() == [[1, 2, 3], [5, 6, 7]]
    assert tokens.document_ids is None and tokens.weights is None


def test_a_bad_loss_makes_its_factor_nan():
    assert finite_or_nan(torch.tensor(2.0)) == 1
    assert all(finite_or_nan(torch.tensor(bad)).isnan() for bad in (float("-inf"), float("nan")))


def test_a_stage_without_a_pipeline_schedule_says_so():
    with pytest.raises(NotImplementedError, match="no pipeline schedule for Stage"):
        Stage(STUDENT).pipeline_step(None)
