"""Run by torchrun on two processes: what the fp32 sums of bf16 gradients are after their reduction, against sums by hand."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from megatron_hypenet.config.schema import ParallelConfig  # noqa: E402
from megatron_hypenet.engine.deepspeed import TrainingEngine  # noqa: E402
from megatron_hypenet.engine.schedule import forward_backward  # noqa: E402
from megatron_hypenet.parallel import groups  # noqa: E402
from tests.unit.engine.toy import ToyData, ToyStage, stage_config  # noqa: E402


def batches(rank):
    return [{"tokens": ToyData().batch(4 * rank + at, 2, 8)} for at in (0, 2)]


def by_hand():
    """Mean over both ranks of each rank's fp32 sum of bf16 gradients."""
    stage, sums = ToyStage(torch.bfloat16), []
    for rank in (0, 1):
        own = [torch.autograd.grad(stage(batch)[0] / 2, list(stage.parameters())) for batch in batches(rank)]
        sums.append([a.float() + b.float() for a, b in zip(*own, strict=True)])
    return [(a + b) / 2 for a, b in zip(*sums, strict=True)]


groups.init_parallel(ParallelConfig())
for exchange, limit in (("float32", 0.0), ("bfloat16", 2.0**-7)):
    stage, parallel = ToyStage(torch.bfloat16), ParallelConfig(gradient_exchange=exchange)
    engine = TrainingEngine(stage, stage_config(global_batch_size=8, clip_grad=0.0), parallel)
    forward_backward(engine, batches(groups.data_rank()))
    wanted = by_hand()
    for parameter, want in zip(stage.parameters(), wanted, strict=True):
        error = (parameter._hp_grad.view_as(want) - want).abs().max() / want.abs().max()
        assert float(error) <= limit, f"{exchange}: {float(error)}"
    norm = float(torch.cat([want.flatten() for want in wanted]).norm())
    assert abs(engine.apply(0.1) / norm - 1) <= max(limit, 1e-6)
    engine.close()
if groups.rank() == 0:
    print("sums agree")
