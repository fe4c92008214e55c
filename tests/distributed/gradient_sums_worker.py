"""Run by torchrun: the fp32 sums of bf16 gradients and their norm after the reduction, against sums
by hand and DeepSpeed's own norm.

Two processes split the data; then, for the norm, a model over two tensor-parallel ranks, once and
on four processes twice."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer  # noqa: E402
from deepspeed.runtime.utils import get_global_norm_of_tensors  # noqa: E402

from megatron_hypenet.config.schema import ParallelConfig  # noqa: E402
from megatron_hypenet.engine.deepspeed.engine import TrainingEngine  # noqa: E402
from megatron_hypenet.model.hypenet import build_model  # noqa: E402
from megatron_hypenet.parallel import groups  # noqa: E402
from megatron_hypenet.stages.base import MicroBatch
from megatron_hypenet.stages.finetune import FinetuneStage  # noqa: E402
from megatron_hypenet.training.schedule import forward_backward  # noqa: E402
from tests.tiny import tiny_model_config  # noqa: E402
from tests.unit.engine.toy import ToyData, ToyStage, stage_config  # noqa: E402

WORLD = int(os.environ["WORLD_SIZE"])


def batches(rank):
    return [MicroBatch(ToyData().batch(4 * rank + at, 2, 8)) for at in (0, 2)]


def by_hand():
    """Return the mean over both ranks of each rank's fp32 sum of bf16 gradients."""
    stage = ToyStage(torch.bfloat16)
    sums = []
    for rank in (0, 1):
        own = [
            torch.autograd.grad(stage(batch)[0] / 2, list(stage.parameters()))
            for batch in batches(rank)
        ]
        sums.append([a.float() + b.float() for a, b in zip(*own, strict=True)])
    return [(a + b) / 2 for a, b in zip(*sums, strict=True)]


def check_sums():
    groups.init_parallel(ParallelConfig())
    for exchange, limit in (("float32", 0.0), ("bfloat16", 2.0**-7)):
        stage = ToyStage(torch.bfloat16)
        parallel = ParallelConfig(gradient_exchange=exchange)
        engine = TrainingEngine(stage, stage_config(global_batch_size=8, clip_grad=0.0), parallel)
        forward_backward(engine, batches(groups.data_rank()))
        optimizer = engine.engine.optimizer
        wanted = dict(zip(stage.parameters(), by_hand(), strict=True))
        for parameters, own in zip(
            optimizer.bf16_groups, optimizer.fp32_groups_gradient_flat_partition, strict=True
        ):
            flat = torch.cat([wanted[parameter].flatten() for parameter in parameters])
            flat = torch.nn.functional.pad(flat, (0, 2 * own.numel() - flat.numel()))
            want = flat[groups.data_rank() * own.numel() :][: own.numel()]
            assert float((own - want).abs().max()) <= limit * float(flat.abs().max()), (
                f"{exchange}: {own} instead of {want}"
            )
        norm = float(torch.cat([want.flatten() for want in wanted.values()]).norm())
        assert abs(engine.apply(0.1) / norm - 1) <= max(limit, 1e-6)
        engine.close()
    groups.destroy_model_groups()


def check_norm(folder):
    """Check that replicated norms count once, split weights everywhere, with one replica and with
    two that see the same samples."""
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    groups.init_parallel(parallel)
    model = build_model(
        tiny_model_config(
            ("lightning_attn", "attn"), num_attention_heads=6, num_query_groups=2, vocab_size=62
        ),
        parallel,
        dtype=torch.bfloat16,
        seed=1,
    )
    replicas = WORLD // 2
    config = stage_config(
        seq_length=8, micro_batch_size=2, global_batch_size=2 * replicas, clip_grad=1e-3
    )
    engine = TrainingEngine(FinetuneStage(model, chunk_tokens=None), config, parallel)
    forward_backward(engine, [MicroBatch(ToyData().batch(0, 2, 8))])
    if replicas == 1:
        optimizer = engine.engine.optimizer
        theirs, _ = BF16_Optimizer.get_grads_for_norm(optimizer)
        assert len(theirs) > 5 and all(all(group) for group in engine.sums.marks)
        own_norm = float(get_global_norm_of_tensors(theirs, mpu=groups.ModelParallelUnit))
    norm = engine.apply(1e-3)
    result = folder / "norm.pt"
    weights = torch.cat([parameter.detach().float().flatten() for parameter in model.parameters()])
    if replicas == 1:
        assert abs(norm / own_norm - 1) < 1e-6, (norm, own_norm)
        torch.save((norm, weights), result.with_suffix(f".{groups.rank()}"))
    else:
        want, updated = torch.load(result.with_suffix(f".{groups.rank() % 2}"), weights_only=True)
        assert abs(norm / want - 1) < 1e-6, (norm, want)
        assert torch.equal(weights, updated)
    engine.close()


if WORLD == 2:
    check_sums()
check_norm(Path(sys.argv[1]))
if groups.rank() == 0:
    print("sums agree")
