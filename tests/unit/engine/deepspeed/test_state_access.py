"""Each kind of DeepSpeed optimizer gets its own access, chosen by what DeepSpeed built."""

import pytest
import torch

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.engine.deepspeed.config import import_deepspeed
from megatron_hypenet.engine.deepspeed.engine import TrainingEngine
from megatron_hypenet.engine.deepspeed.state_access import (
    Bf16Access,
    Zero3Access,
    Zero12Access,
    is_replicated,
    mark_replicated,
    optimizer_access,
)
from megatron_hypenet.errors import SetupError
from megatron_hypenet.parallel import groups
from megatron_hypenet.stages.base import MicroBatch
from tests.unit.engine.toy import ToyData, ToyStage, stage_config


@pytest.fixture(autouse=True)
def parallel():
    groups.init_parallel(ParallelConfig())


@pytest.fixture
def make():
    engines = []

    def build(zero_stage=1, dtype=torch.float32, **changes):
        engine = TrainingEngine(
            ToyStage(dtype), stage_config(), ParallelConfig(zero_stage=zero_stage, **changes)
        )
        engines.append(engine)
        return engine

    yield build
    for engine in engines:
        engine.close()


@pytest.mark.parametrize(
    ("zero_stage", "dtype", "kind"),
    [
        (0, torch.bfloat16, Bf16Access),
        (1, torch.bfloat16, Bf16Access),
        (1, torch.float32, Zero12Access),
        (2, torch.bfloat16, Zero12Access),
        (3, torch.bfloat16, Zero3Access),
        (3, torch.float32, Zero3Access),
    ],
)
def test_what_a_layout_selects(make, zero_stage, dtype, kind):
    engine = make(zero_stage, dtype)
    assert type(engine.access) is kind
    assert (engine.sums is not None) == (kind is Bf16Access)
    assert engine.access.adam_step() == 0
    held = sum(flat.numel() for flat in engine.access.flat_parameters())
    assert held >= sum(p.numel() for p in engine.module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_accumulated_gradient_is_the_sum_over_micro_batches(make, dtype):
    engine = make(1, dtype)
    engine.engine.set_gradient_accumulation_boundary(False)
    batch = MicroBatch(ToyData().batch(0, 2, 8))
    sums = []
    for _ in range(2):
        engine.module.forward(batch)[0].backward()
        sums.append(engine.access.accumulated_gradient(engine.module.bias).float().clone())
    assert sums[0].any()
    torch.testing.assert_close(sums[1], 2 * sums[0], rtol=1e-6, atol=0)


def test_a_refused_update_leaves_no_gradient_in_the_cpus_buffers(make):
    engine = make(1, offload_optimizer=True)
    access = engine.access
    assert type(access) is Zero12Access and access.optimizer.cpu_offload
    access.optimizer.averaged_gradients = {0: [torch.ones(2)]}
    access.drop_gradients()
    assert access.optimizer.averaged_gradients == {0: None}


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(SetupError, match=r"made a SGD, .* 0\.19\.8"):
        optimizer_access(torch.optim.SGD([torch.ones(1)]), import_deepspeed())


def test_a_replicated_parameter_is_marked():
    parameter = torch.nn.Parameter(torch.ones(1))
    assert not is_replicated(parameter)
    mark_replicated(parameter)
    assert is_replicated(parameter)
