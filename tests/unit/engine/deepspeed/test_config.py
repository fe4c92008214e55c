"""DeepSpeed's configuration, and its import."""

import os

import pytest
import torch

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.engine.deepspeed.config import config_dict, import_deepspeed
from megatron_hypenet.engine.deepspeed.engine import TrainingEngine
from megatron_hypenet.parallel import groups
from tests.unit.engine.toy import ToyStage, stage_config


@pytest.fixture(autouse=True)
def parallel():
    groups.init_parallel(ParallelConfig())


def test_starts_fast_and_compiles_nothing(capfd):
    # processor time with children, a compiler for one: other tests run beside this one
    started = sum(os.times()[:4])
    assert import_deepspeed().ops.__compatible_ops__["deepspeed_shm_comm"] is False
    TrainingEngine(ToyStage(torch.bfloat16), stage_config(), ParallelConfig()).close()
    assert sum(os.times()[:4]) - started < 10
    assert capfd.readouterr().out == ""


def test_config_covers_precision_and_stage_zero():
    config = stage_config(clip_grad=0.0)
    assert (
        config_dict(config, ParallelConfig(zero_stage=0), num_micro_batches=3, dtype=torch.float32)[
            "zero_optimization"
        ]["stage"]
        == 1
    )
    bf16 = config_dict(
        config, ParallelConfig(zero_stage=2), num_micro_batches=3, dtype=torch.bfloat16
    )
    assert bf16["bf16"] == {
        "enabled": True,
        "immediate_grad_update": True,
        "check_grad_overflow": True,
    }
    assert bf16["gradient_accumulation_steps"] == 3
    with pytest.raises(ValueError, match="float16"):
        config_dict(config, ParallelConfig(zero_stage=1), num_micro_batches=1, dtype=torch.float16)
