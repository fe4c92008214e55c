"""Stage 1 against plain torch: the teacher is untouched, every layer's loss is its own."""

import pytest
import torch

from megatron_hypenet.config.mixers import default_mixer
from megatron_hypenet.stages.align import AlignStage, mean_squared_error
from megatron_hypenet.stages.aligned_mixers import AlignedMixers
from tests.unit.stages.conftest import TEACHER, build


@pytest.fixture
def stage():
    trunk = build(TEACHER, trunk_only=True)
    return AlignStage(trunk, AlignedMixers.from_teacher(trunk, default_mixer(), seed=3))


def expected_losses(tokens):
    """Return per-layer losses from a whole teacher and separate mixers, with autograd's own
    arithmetic."""
    teacher = build(TEACHER)
    mixers = AlignedMixers.from_teacher(teacher, default_mixer(), seed=3)
    inputs = {}

    def note(layer):
        return lambda _module, args, kwargs, out: inputs.update({layer: (args[0], kwargs, out[0])})

    hooks = [
        teacher.mixer(layer).register_forward_hook(note(layer), with_kwargs=True)
        for layer in range(TEACHER.num_layers)
    ]
    with torch.no_grad():
        teacher.hidden(tokens[:, :-1])
    for hook in hooks:
        hook.remove()
    losses = []
    for layer, mixer in mixers.items():
        x, kwargs, target = inputs[layer]
        losses.append((mixer(x, **kwargs)[0] - target).pow(2).mean())
    return mixers, losses


def test_loss_and_gradients_are_those_of_plain_torch(stage, batch):
    loss, metrics = stage(batch)
    loss.backward()
    mixers, losses = expected_losses(batch.tokens)
    torch.stack(losses).mean().backward()
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-12, atol=0)
    assert list(metrics) == ["align-layers/00", "align-layers/01", "align-layers/02"]
    for got, want in zip(metrics.values(), losses, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=0)
        assert not got.requires_grad
    for (name, got), want in zip(stage.mixers.named_parameters(), mixers.parameters(), strict=True):
        torch.testing.assert_close(
            got.grad, want.grad, rtol=1e-9, atol=1e-14, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_the_trunk_computes_what_the_teacher_computes(stage, batch):
    """Wrapping the attention must not change what flows down: the last layer's loss would see
    it."""
    whole = build(TEACHER)
    states = whole.hidden_states(batch.tokens[:, :-1])
    wrapped = AlignStage(whole, AlignedMixers.from_teacher(whole, default_mixer(), seed=3))
    again = whole.hidden_states(batch.tokens[:, :-1])
    for before, after in zip(states, again, strict=True):
        assert torch.equal(before, after)
    assert wrapped.teacher is whole


def test_only_the_mixers_train_and_are_saved(stage):
    names = set(stage.trainable_parameters())
    assert names == {name for name, _ in stage.named_parameters()} and all(
        name.startswith("mixers.mixers.") for name in names
    )
    saved = stage.sharded_state_dict()
    assert all(name.startswith("decoder.layers.") and ".self_attention." in name for name in saved)
    assert {name.split(".")[2] for name in saved} == {"0", "1", "2"}
    assert stage.model_config.mixer_types == ("lightning_attn",) * 3


def test_a_layers_gradient_comes_from_its_own_loss(stage, batch):
    """Scaling the other layers' targets away must not change layer 1's gradient."""
    loss, _ = stage(batch)
    loss.backward()
    want = stage.mixers.of_layer(1).linear_in.weight.grad.clone()
    stage.zero_grad()
    with torch.no_grad():
        for layer in (0, 2):
            for parameter in stage.mixers.of_layer(layer).parameters():
                parameter.mul_(3.0)
    loss, _ = stage(batch)
    loss.backward()
    assert torch.equal(stage.mixers.of_layer(1).linear_in.weight.grad, want)


def test_a_few_steps_of_adam_reduce_every_layers_loss(stage, batch):
    optimizer = torch.optim.Adam(stage.trainable_parameters().values(), lr=1e-2)
    _, first = stage(batch)
    for _ in range(20):
        optimizer.zero_grad()
        loss, last = stage(batch)
        loss.backward()
        optimizer.step()
    assert all(last[name] < 0.5 * first[name] for name in first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_squared_error_sums_wide_and_keeps_the_dtype_of_its_input(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(5, 3, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)
    )
    a.requires_grad_()
    loss = mean_squared_error(a, b)
    (3 * loss).backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = a.detach().double() - b.double()
    torch.testing.assert_close(loss.detach().double(), exact.pow(2).mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        a.grad.double(),
        6 * exact / a.numel(),
        rtol=2**-7 if dtype == torch.bfloat16 else 1e-6,
        atol=1e-9,
    )
