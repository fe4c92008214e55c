"""The fp32 sums of bf16 gradients are DeepSpeed's own numbers, taken in fewer passes."""

import pytest
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.engine.deepspeed import bf16_accumulation
from megatron_hypenet.engine.deepspeed.engine import TrainingEngine
from megatron_hypenet.engine.deepspeed.state_access import Bf16Access
from megatron_hypenet.ops.gradient_sum import fused_gradient_sum
from megatron_hypenet.parallel import groups
from megatron_hypenet.stages.base import MicroBatch
from megatron_hypenet.training.schedule import forward_backward
from tests.unit.engine.toy import ToyData, ToyStage, stage_config


@pytest.fixture(autouse=True)
def parallel():
    groups.init_parallel(ParallelConfig())


def batches(step):
    return [MicroBatch(ToyData().batch(4 * step + at, 2, 8)) for at in (0, 2)]


def gradients(step):
    """Compute the fp32 sums of the bf16 gradients of a step's two micro-batches by hand."""
    stage = ToyStage(torch.bfloat16)
    sums = []
    for batch in batches(step):
        found = torch.autograd.grad(stage(batch)[0] / 2, list(stage.parameters()))
        sums = (
            [x.float() for x in found]
            if not sums
            else [total + x.float() for total, x in zip(sums, found, strict=True)]
        )
    return sums


def engine_of(stage, **parallel):
    return TrainingEngine(stage, stage_config(clip_grad=0.0), ParallelConfig(**parallel))


def test_sums_are_those_of_the_step_alone():
    stage = ToyStage(torch.bfloat16)
    engine = engine_of(stage)
    assert isinstance(engine.engine.optimizer, BF16_Optimizer), "what is patched"
    for step in range(2):  # the second begins with the first one's numbers in memory
        assert engine.sums.empty
        forward_backward(engine, batches(step))
        assert not engine.sums.empty and all(all(group) for group in engine.sums.marks)
        for parameter, want in zip(stage.parameters(), gradients(step), strict=True):
            assert parameter.grad is None and torch.equal(parameter._hp_grad.view_as(want), want)
        norm = torch.cat([x.flatten() for x in gradients(step)]).double().norm()
        # learning rate 0: the weights stay
        assert engine.apply(0.0) == pytest.approx(float(norm), rel=1e-6)
    engine.close()


def test_the_kernel_gives_the_same_sums(monkeypatch):
    """The gradients of two micro-batches are views of one flat buffer."""
    pytest.importorskip("triton")
    calls = []
    monkeypatch.setattr(
        bf16_accumulation,
        "gradient_sum",
        lambda *args, add: calls.append(add) or fused_gradient_sum(*args, add=add),
    )
    stage = ToyStage(torch.bfloat16)
    engine = engine_of(stage)
    forward_backward(engine, batches(0))
    assert sorted(calls) == [False] * 3 + [True] * 3
    for parameter, want in zip(stage.parameters(), gradients(0), strict=True):
        assert torch.equal(parameter._hp_grad.view_as(want), want)
    engine.close()


def test_equals_deepspeeds_own_sums(monkeypatch):
    """The weights after steps with clipping are the same, with and without the shortcut, bit for
    bit."""
    found = []
    for shortcut in (True, False):
        stage = ToyStage(torch.bfloat16)
        if not shortcut:
            monkeypatch.setattr(Bf16Access, "accumulate_in_fp32", lambda *args: None)
        engine = TrainingEngine(stage, stage_config(weight_decay=0.1), ParallelConfig())
        for step in range(4):
            forward_backward(engine, batches(step))
            engine.apply(0.05)
        found.append([parameter.detach().clone() for parameter in stage.parameters()])
        engine.close()
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_a_parameter_without_a_gradient_counts_as_zero():
    """Its sum holds an earlier step's gradient, which must reach neither the norm nor the
    weights."""
    stage = ToyStage(torch.bfloat16)
    engine = engine_of(stage)
    forward_backward(engine, batches(0))
    engine.apply(0.0)
    stage.bias.requires_grad_(False)
    for batch, last in zip(batches(1), (False, True), strict=True):
        engine.micro_step(batch, last=last)
    table, head, _ = gradients(1)
    assert engine.apply(0.1) == pytest.approx(
        float(torch.cat((table.flatten(), head.flatten())).norm()), rel=1e-6
    )
    assert torch.equal(stage.bias._hp_grad, torch.zeros_like(stage.bias._hp_grad))
    engine.close()
