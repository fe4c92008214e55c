"""What every registered mixer must do, tested unasked: a new mixer passes here before it is used."""

import pytest
import torch

from megatron_hypenet.config.mixers import mixer_specs
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.model.hypenet import build_model
from megatron_hypenet.model.mixers import registered_mixers
from tests.tiny import tiny_model_config, tiny_teacher_config

MIXERS = sorted(registered_mixers())
RECURRENT = [name for name in MIXERS if mixer_specs()[name].recurrent]
HEADS = [(1, 1), (2, 1), (4, 2), (6, 3), (5, 5), (12, 4)]


def build(name, dtype=torch.float64, **changes):
    return build_model(tiny_model_config((name, name), **changes), ParallelConfig(), dtype=dtype, seed=2)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_no_output_depends_on_a_later_token(name, heads, groups):
    model = build(name, num_attention_heads=heads, num_query_groups=groups)
    ids = torch.randint(0, 61, (1, 23))
    changed = ids.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % 61
    with torch.no_grad():
        a, b = model(ids), model(changed)
    torch.testing.assert_close(a[:, :15], b[:, :15], rtol=1e-12, atol=1e-14)
    assert (a[:, 15:] - b[:, 15:]).abs().max() > 1e-9


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("length", [1, 2, 63, 65, 130])
def test_a_prefix_gives_the_same_outputs_as_the_whole(name, length):
    """Any length, odd ones too: what a token sees does not depend on where the input ends."""
    model = build(name)
    ids = torch.randint(0, 61, (2, 131))
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, :length]), model(ids)[:, :length], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_predicted_parameter_count_is_the_built_one(name, heads, groups):
    model = build(name, num_attention_heads=heads, num_query_groups=groups)
    mixer = model.mixer(1)
    assert mixer.spec.num_parameters(model.model_config) == sum(p.numel() for p in mixer.parameters())


@pytest.mark.parametrize("name", MIXERS)
def test_flops_are_positive_and_recurrent_ones_do_not_grow_with_the_context(name):
    config = tiny_model_config((name,))
    spec = config.spec(name)
    short, long = spec.flops(config, 512).total, spec.flops(config, 65536).total
    assert short > 0 and (long == short if spec.recurrent else long > short)


@pytest.mark.parametrize("name", MIXERS)
def test_every_parameter_gets_a_gradient(name):
    model = build(name)
    model(torch.randint(0, 61, (2, 9))).square().sum().backward()
    for key, parameter in model.mixer(0).named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", MIXERS)
def test_lower_precision_stays_close_to_float64(name):
    reference = build(name)
    ids = torch.randint(0, 61, (2, 40))
    with torch.no_grad():
        want = reference(ids)
        for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
            model = build(name, dtype)
            model.load_state_dict(reference.state_dict(), strict=False)
            model.to(dtype)
            got = model(ids)
            assert got.dtype == dtype
            assert (got.double() - want).norm() / want.norm() < limit, dtype


@pytest.mark.parametrize("name", MIXERS)
def test_checkpoint_sections_tile_the_fused_projection(name):
    mixer = build(name).mixer(0)
    factory = mixer.sharded_state_dict("m.")["m.linear_in.weight"]
    assert torch.equal(factory.merge_fn({k: part.data for k, part in factory.build().items()}), mixer.linear_in.weight)


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_recurrent_mixers_take_over_attention_weights(name, heads, groups):
    shape = {"num_attention_heads": heads, "num_query_groups": groups}
    teacher = build_model(tiny_teacher_config(2, **shape), ParallelConfig(), dtype=torch.float64, seed=4)
    mixer = build(name, **shape).mixer(1)
    before = [p.clone() for p in mixer.parameters()]
    assert mixer.init_from_attention(teacher.mixer(1), seed=9) is mixer
    assert any(not torch.equal(a, b) for a, b in zip(before, mixer.parameters(), strict=True))
    assert torch.equal(mixer.linear_proj.weight, teacher.mixer(1).linear_proj.weight)
