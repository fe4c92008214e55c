"""BF16_Optimizer's step with clipping, update and bf16 copy in one pass does what its own three passes do."""

import pytest
import torch

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.engine import master_weights
from megatron_hypenet.engine.deepspeed import TrainingEngine
from megatron_hypenet.engine.master_weights import MasterAdamW
from megatron_hypenet.engine.schedule import forward_backward
from megatron_hypenet.ops.adamw import fused_adamw
from megatron_hypenet.parallel import groups
from tests.unit.engine.toy import ToyData, ToyStage, stage_config


@pytest.fixture(autouse=True)
def parallel():
    groups.init_parallel(ParallelConfig())


def train(steps=4, **changes):
    """bf16 weights, masters and moments by parameter after some steps, and the norms on the way."""
    stage = ToyStage(torch.bfloat16)
    engine = TrainingEngine(stage, stage_config(**changes), ParallelConfig())
    norms = []
    for step in range(steps):
        forward_backward(engine, [{"tokens": ToyData().batch(4 * step + at, 2, 8)} for at in (0, 2)])
        norms.append(engine.apply(0.05))
    found = {}
    for name, parameter in stage.named_parameters():
        found[name] = parameter.detach().clone()
        found |= {f"{name} {key}": engine.full_state(parameter, key).clone() for key in ("fp32_param", "exp_avg", "exp_avg_sq")}
    assert engine.adam_step() == steps
    engine.close()
    return found, norms


@pytest.mark.parametrize(("clip", "clipped"), [(0.3, True), (50.0, False), (0.0, False)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_deepspeeds_own_step(monkeypatch, clip, clipped, weight_decay):
    ours, norms = train(clip_grad=clip, weight_decay=weight_decay)
    assert all(norm > 0.3 for norm in norms) and clipped == (0 < clip < min(norms)), "the case is what it is called"
    monkeypatch.setattr("megatron_hypenet.engine.deepspeed.GradientSums", lambda *args, **kwargs: None)
    monkeypatch.setattr(MasterAdamW, "take_over", lambda self, owner: None)
    theirs, their_norms = train(clip_grad=clip, weight_decay=weight_decay)
    assert norms == pytest.approx(their_norms, rel=1e-6)
    for name, want in theirs.items():
        torch.testing.assert_close(ours[name].float(), want.float(), rtol=1e-2 if want.dtype == torch.bfloat16 else 1e-5, atol=1e-7)


def test_the_kernel_gives_the_same_weights(monkeypatch):
    pytest.importorskip("triton")
    want, _ = train(steps=1, weight_decay=0.1)
    calls = []
    monkeypatch.setattr(master_weights, "adamw", lambda *args: calls.append(args[-1].count) or fused_adamw(*args))
    ours, _ = train(steps=1, weight_decay=0.1)
    assert calls == [1, 1]  # matrices and vectors
    for name, value in want.items():  # Triton's interpreter cuts bf16 off instead of rounding it
        torch.testing.assert_close(ours[name].float(), value.float(), rtol=1e-2 if value.dtype == torch.bfloat16 else 1e-5, atol=1e-7)


def test_gradients_are_scaled_once(monkeypatch):
    """By the update alone: DeepSpeed's own scaling finds nothing to scale."""
    seen = []
    monkeypatch.setattr(master_weights, "adamw", lambda weight, gradient, *rest: seen.append((gradient.norm(), rest[-1].scale)))
    _, norms = train(steps=1, clip_grad=0.3)
    ((norm, scale),) = seen
    assert float(norm) == pytest.approx(norms[0], rel=1e-6) and scale == pytest.approx(0.3 / norms[0], rel=1e-5)


def test_fp32_training_keeps_torchs_step(monkeypatch):
    monkeypatch.setattr(master_weights, "adamw", lambda *args: pytest.fail("there are no masters"))
    stage = ToyStage()
    engine = TrainingEngine(stage, stage_config(), ParallelConfig())
    before = stage.head.detach().clone()
    forward_backward(engine, [{"tokens": ToyData().batch(at, 2, 8)} for at in (0, 2)])
    engine.apply(0.05)
    assert not torch.equal(stage.head, before)
    engine.close()
