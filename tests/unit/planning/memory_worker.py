"""Run alone, where no other test has left tensors: the bytes of all tensors that DeepSpeed's engine
makes for a million weights, by ZeRO stage, as JSON."""

import gc
import json

import torch
from torch import nn

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.engine.deepspeed import config
from megatron_hypenet.engine.deepspeed.engine import TrainingEngine
from megatron_hypenet.parallel import groups
from megatron_hypenet.stages.base import MicroBatch
from tests.unit.engine.toy import ToyData, ToyStage, stage_config

BUCKET = 250_000


class Wide(ToyStage):
    """A million weights, so that DeepSpeed's own small tensors do not count."""

    def __init__(self):
        super().__init__(torch.bfloat16)
        del self.table, self.head, self.bias
        self.layers = nn.ParameterList(
            [nn.Parameter(torch.randn(500, 500).bfloat16()) for _ in range(4)]
        )

    def forward(self, batch):
        x = torch.ones(4, 500, dtype=torch.bfloat16)
        for weight in self.layers:
            x = torch.tanh(x @ weight)
        return x.float().mean(), {}


def storages():
    """Return the memory of all allocated tensors, gradients too, by address."""
    gc.collect()
    found = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    gradients = [x.grad for x in found if x.is_leaf and x.grad is not None]
    return {x.untyped_storage().data_ptr(): x.untyped_storage() for x in [*found, *gradients]}


def held(zero_stage):
    before = storages()
    engine = TrainingEngine(
        Wide(),
        stage_config(global_batch_size=2),
        ParallelConfig(zero_stage=zero_stage, gradient_exchange="bfloat16"),
    )
    engine.micro_step(MicroBatch(ToyData().batch(0, 2, 8)), last=True)
    found = sum(
        storage.nbytes() for address, storage in storages().items() if address not in before
    )
    engine.close()
    return found


if __name__ == "__main__":
    config.BUCKET_ELEMENTS = BUCKET
    groups.init_parallel(ParallelConfig())
    print(json.dumps({zero_stage: held(zero_stage) for zero_stage in (1, 2, 3)}))
