"""DeepSpeed's step equals plain AdamW under every ZeRO stage, refuses bad gradients, and gives its
state away by parameter."""

import pytest
import torch

from megatron_hypenet.checkpoint.format import OPTIMIZER_STATES
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.engine.deepspeed.engine import RefusedUpdate, TrainingEngine
from megatron_hypenet.engine.optim import lr_at
from megatron_hypenet.errors import DivergedError, LayoutError
from megatron_hypenet.parallel import groups
from megatron_hypenet.stages.base import MicroBatch
from megatron_hypenet.training.schedule import forward_backward
from tests.unit.engine.toy import VOCAB, ToyData, ToyStage, stage_config


@pytest.fixture(autouse=True)
def parallel():
    groups.init_parallel(ParallelConfig())


def micro_batches(step):
    return [MicroBatch(ToyData().batch(4 * step + at, 2, 8)) for at in (0, 2)]


def plain_adamw(config, steps):
    """Return losses, norms and weights without DeepSpeed."""
    stage = ToyStage()
    results = []
    matrices = [stage.table, stage.head]
    vectors = [stage.bias]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    for step in range(steps):
        losses = [stage(batch)[0] for batch in micro_batches(step)]
        (sum(losses) / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(stage.parameters(), config.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, config)
        optimizer.step()
        optimizer.zero_grad()
        results.append((float(sum(losses) / 2), float(norm)))
    return results, stage


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_equals_plain_adamw(zero_stage):
    config = stage_config(weight_decay=0.1, clip_grad=0.3)
    want, reference = plain_adamw(config, 4)
    stage = ToyStage()
    engine = TrainingEngine(stage, config, ParallelConfig(zero_stage=zero_stage))
    assert engine.zero_stage == max(zero_stage, 1) and engine.adam_step() == 0
    for step, (loss, norm) in enumerate(want):
        got, metrics = forward_backward(engine, micro_batches(step))
        assert float(got) == pytest.approx(loss, rel=1e-6) and float(
            metrics["align-layers/00"]
        ) == pytest.approx(2 * loss, rel=1e-6)
        assert engine.apply(lr_at(step, config)) == pytest.approx(norm, rel=1e-5)
    assert engine.adam_step() == 4
    for (name, parameter), (_, wanted) in zip(
        stage.named_parameters(), reference.named_parameters(), strict=True
    ):
        with engine.gathered(parameter):
            torch.testing.assert_close(
                parameter.detach(),
                wanted.detach(),
                rtol=1e-5,
                atol=1e-6,
                msg=lambda m, n=name: f"{n}: {m}",
            )
    engine.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_gradient_that_is_not_finite_changes_no_weight(zero_stage, dtype):
    stage = ToyStage(dtype, poison=VOCAB - 1)
    stage.poison_gradient = True
    engine = TrainingEngine(
        stage, stage_config(weight_decay=0.1), ParallelConfig(zero_stage=zero_stage)
    )
    forward_backward(engine, micro_batches(0))
    engine.apply(0.05)
    before = [
        engine.full_state(parameter, "fp32_param").clone() for parameter in stage.parameters()
    ]
    forward_backward(engine, [MicroBatch(torch.full((2, 9), VOCAB - 1))] * 2)
    with pytest.raises(DivergedError):
        engine.apply(0.05)
    for parameter, old in zip(stage.parameters(), before, strict=True):
        assert torch.equal(engine.full_state(parameter, "fp32_param"), old)
        with engine.gathered(parameter):
            assert torch.equal(parameter.detach().float(), old.to(dtype).float())
    engine.close()


def state_of(engine):
    """Return weights, master weights and moments as one list, and Adam's step."""
    found = []
    for entry in engine.template:
        found += [engine.full_state(entry.parameter, name).clone() for name in OPTIMIZER_STATES]
        with engine.gathered(entry.parameter):
            found.append(entry.parameter.detach().clone())
    return found, engine.adam_step()


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_training_after_a_refused_step_is_as_if_it_had_not_been(zero_stage, dtype, offload):
    poison = torch.full((2, 9), VOCAB - 1)
    states = []
    for refused in (False, True):
        stage = ToyStage(dtype, poison=VOCAB - 1)
        engine = TrainingEngine(
            stage,
            stage_config(weight_decay=0.1),
            ParallelConfig(zero_stage=zero_stage, offload_optimizer=offload),
        )
        for step in range(4):
            forward_backward(engine, micro_batches(step))
            engine.apply(0.05)
            # a bad first micro-batch, a bad last one with a finite loss, then both bad
            if refused and step == 1:
                for bad_gradient, where in ((False, (0,)), (True, (1,)), (False, (0, 1))):
                    stage.poison_gradient = bad_gradient
                    batches = [
                        MicroBatch(poison) if at in where else batch
                        for at, batch in enumerate(micro_batches(9))
                    ]
                    loss, _ = forward_backward(engine, batches)
                    assert torch.isfinite(loss) == bad_gradient
                    with pytest.raises(RefusedUpdate, match="not finite"):
                        engine.apply(0.05)
        states.append(state_of(engine))
        engine.close()
    (want, steps), (got, steps_too) = states
    assert steps == steps_too == 4 and all(
        torch.equal(one, other) for one, other in zip(want, got, strict=True)
    )


def test_a_bad_loss_with_finite_gradients_is_refused_too():
    stage = ToyStage()
    forward = stage.forward
    stage.forward = lambda batch: (forward(batch)[0] + float("inf"), {})
    engine = TrainingEngine(stage, stage_config(), ParallelConfig())
    forward_backward(engine, micro_batches(0))
    with pytest.raises(RefusedUpdate):
        engine.apply(0.05)
    engine.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_state_goes_in_and_out_by_parameter(zero_stage, dtype):
    stage = ToyStage(dtype)
    engine = TrainingEngine(
        stage, stage_config(weight_decay=0.1), ParallelConfig(zero_stage=zero_stage)
    )
    generator = torch.Generator().manual_seed(3)
    values = {}
    engine.init_optimizer_state(5)
    for entry in engine.template:
        for name in OPTIMIZER_STATES:
            values[entry.index, name] = torch.rand(entry.shape, generator=generator)
            engine.set_full_state(entry.parameter, name, values[entry.index, name])
        engine.set_weight(entry.parameter, values[entry.index, "fp32_param"].to(dtype))
    assert engine.adam_step() == 5
    for entry in engine.template:
        for name in OPTIMIZER_STATES:
            assert torch.equal(
                engine.full_state(entry.parameter, name), values[entry.index, name]
            ), name
        with engine.gathered(entry.parameter):
            assert torch.equal(
                entry.parameter.detach(), values[entry.index, "fp32_param"].to(dtype)
            )
    forward_backward(engine, micro_batches(0))
    engine.apply(0.05)
    assert engine.adam_step() == 6
    engine.close()


def test_pipeline_parallelism_goes_with_zero_one_at_most(monkeypatch):
    monkeypatch.setattr(groups, "pipeline_stage", lambda: (0, 2))
    with pytest.raises(LayoutError, match="zero_stage=2 under pipeline parallelism"):
        TrainingEngine(ToyStage(), stage_config(), ParallelConfig(zero_stage=2))
