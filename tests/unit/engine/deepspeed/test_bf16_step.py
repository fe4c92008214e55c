"""BF16_Optimizer's step with clipping, update and bf16 copy in one pass does what its own three
passes do."""

import pytest
import torch

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.engine.deepspeed import bf16_step
from megatron_hypenet.engine.deepspeed.engine import RefusedUpdate, TrainingEngine
from megatron_hypenet.engine.deepspeed.state_access import Bf16Access
from megatron_hypenet.ops.adamw import fused_adamw
from megatron_hypenet.parallel import groups
from megatron_hypenet.stages.base import MicroBatch
from megatron_hypenet.training.schedule import forward_backward
from tests.unit.engine.toy import ToyData, ToyStage, stage_config


@pytest.fixture(autouse=True)
def parallel():
    groups.init_parallel(ParallelConfig())


def train(steps=4, **changes):
    """Return bf16 weights, masters and moments by parameter after some steps, and the norms on the
    way."""
    stage = ToyStage(torch.bfloat16)
    engine = TrainingEngine(stage, stage_config(**changes), ParallelConfig())
    norms = []
    for step in range(steps):
        forward_backward(
            engine, [MicroBatch(ToyData().batch(4 * step + at, 2, 8)) for at in (0, 2)]
        )
        norms.append(engine.apply(0.05))
    found = {}
    for name, parameter in stage.named_parameters():
        found[name] = parameter.detach().clone()
        found |= {
            f"{name} {key}": engine.full_state(parameter, key).clone()
            for key in ("fp32_param", "exp_avg", "exp_avg_sq")
        }
    assert engine.adam_step() == steps
    engine.close()
    return found, norms


def deepspeeds_own(monkeypatch):
    """Use neither sums nor step of this package."""
    monkeypatch.setattr(Bf16Access, "accumulate_in_fp32", lambda *args: None)


@pytest.mark.parametrize(("clip", "clipped"), [(0.3, True), (50.0, False), (0.0, False)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_deepspeeds_own_step(monkeypatch, clip, clipped, weight_decay):
    ours, norms = train(clip_grad=clip, weight_decay=weight_decay)
    assert all(norm > 0.3 for norm in norms) and clipped == (0 < clip < min(norms)), (
        "the case is what it is called"
    )
    deepspeeds_own(monkeypatch)
    theirs, their_norms = train(clip_grad=clip, weight_decay=weight_decay)
    assert norms == pytest.approx(their_norms, rel=1e-6)
    for name, want in theirs.items():
        torch.testing.assert_close(
            ours[name].float(),
            want.float(),
            rtol=1e-2 if want.dtype == torch.bfloat16 else 1e-5,
            atol=1e-7,
        )


def test_the_kernel_gives_the_same_weights(monkeypatch):
    pytest.importorskip("triton")
    want, _ = train(steps=1, weight_decay=0.1)
    calls = []
    monkeypatch.setattr(
        bf16_step, "adamw", lambda *args: calls.append(args[5].count) or fused_adamw(*args)
    )
    ours, _ = train(steps=1, weight_decay=0.1)
    assert calls == [1, 1]  # matrices and vectors
    for name, value in want.items():  # Triton's interpreter cuts bf16 off instead of rounding it
        torch.testing.assert_close(
            ours[name].float(),
            value.float(),
            rtol=1e-2 if value.dtype == torch.bfloat16 else 1e-5,
            atol=1e-7,
        )


def test_gradients_are_scaled_once(monkeypatch):
    """By the update alone: DeepSpeed's own scaling finds nothing to scale."""
    seen = []
    monkeypatch.setattr(
        bf16_step,
        "adamw",
        lambda weight, gradient, *rest: seen.append((gradient.norm(), float(rest[-1]))),
    )
    _, norms = train(steps=1, clip_grad=0.3)
    ((norm, scale),) = seen
    assert float(norm) == pytest.approx(norms[0], rel=1e-6) and scale == pytest.approx(
        0.3 / norms[0], rel=1e-5
    )


@pytest.mark.parametrize("clip", [0.3, 0.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])  # the square of the last is infinite
def test_a_norm_that_is_not_finite_changes_nothing(clip, bad):
    stage = ToyStage(torch.bfloat16)
    engine = TrainingEngine(stage, stage_config(clip_grad=clip), ParallelConfig())
    batches = [MicroBatch(ToyData().batch(at, 2, 8)) for at in (0, 2)]
    forward_backward(engine, batches)
    engine.apply(0.05)

    def everything():
        states = (
            engine.full_state(x, key)
            for x in stage.parameters()
            for key in ("fp32_param", "exp_avg", "exp_avg_sq")
        )
        return [x.detach().clone() for x in (*stage.parameters(), *states)]

    before = everything()
    forward_backward(engine, batches)
    engine.sums.optimizer.fp32_groups_gradient_flat_partition[-1][0] = bad
    with pytest.raises(RefusedUpdate):
        engine.apply(0.05)
    assert (
        all(torch.equal(x, y) for x, y in zip(everything(), before, strict=True))
        and engine.adam_step() == 1
    )
    forward_backward(engine, batches)
    assert engine.apply(0.05) > 0 and engine.adam_step() == 2
    engine.close()


@pytest.mark.gpu
def test_the_host_reads_nothing_but_the_norm(monkeypatch):
    """The same holds while the update runs: whatever waits for the device in between would
    raise."""
    engine = TrainingEngine(
        ToyStage(torch.bfloat16).cuda(), stage_config(clip_grad=0.3), ParallelConfig()
    )
    batches = [MicroBatch(ToyData().batch(at, 2, 8).cuda()) for at in (0, 2)]
    for _ in range(2):  # the first compiles
        forward_backward(engine, batches)
        engine.apply(0.05)
    forward_backward(engine, batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.apply(0.05)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    engine.close()


def test_fp32_training_keeps_torchs_step(monkeypatch):
    monkeypatch.setattr(bf16_step, "adamw", lambda *args: pytest.fail("there are no masters"))
    stage = ToyStage()
    engine = TrainingEngine(stage, stage_config(), ParallelConfig())
    before = stage.head.detach().clone()
    forward_backward(engine, [MicroBatch(ToyData().batch(at, 2, 8)) for at in (0, 2)])
    engine.apply(0.05)
    assert not torch.equal(stage.head, before)
    engine.close()
