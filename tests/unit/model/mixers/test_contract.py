"""What every registered mixer must do, tested unasked, and on a toy that has parameters of its own
and a convolution: a new mixer passes here before it is used."""

import copy
import math

import pytest
import torch

from megatron_hypenet.checkpoint.load import load_model
from megatron_hypenet.checkpoint.save import write_weights
from megatron_hypenet.config.mixers import mixer_specs
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.export import hf_config, mapping, tensors
from megatron_hypenet.model.hypenet import build_model
from megatron_hypenet.model.mixers import registered_mixers
from megatron_hypenet.parallel.context.layout import local_part, natural_order
from megatron_hypenet.planning.memory import stage_memory
from megatron_hypenet.stages.aligned_mixers import AlignedMixers
from tests import toy_mixer
from tests.dense_attention import document_ids
from tests.threaded_ranks import on_ranks
from tests.tiny import tiny_model_config, tiny_teacher_config, whole_tensors
from tests.unit.engine.toy import stage_config

MIXERS = sorted(registered_mixers())
RECURRENT = [name for name in MIXERS if mixer_specs()[name].recurrent]
NO_NORMS_BUT_BIASES = {"qk_layernorm": False, "add_qkv_bias": True}
"""What a teacher may have (Qwen2) and its student keeps."""
HEADS = [(1, 1), (2, 1), (4, 2), (6, 3), (5, 5), (12, 4)]


def build(name, dtype=torch.float64, **changes):
    return build_model(
        tiny_model_config((name, name), **changes), ParallelConfig(), dtype=dtype, seed=2
    )


def test_the_toy_is_among_the_tested():
    assert toy_mixer.NAME in RECURRENT and set(MIXERS) == set(mixer_specs())


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
        torch.testing.assert_close(
            model(ids[:, :length]), model(ids)[:, :length], rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_the_parameters_are_those_of_the_specification(name, heads, groups):
    model = build(name, num_attention_heads=heads, num_query_groups=groups)
    mixer = model.mixer(1)
    config = model.model_config
    assert mixer.spec.num_parameters(config) == sum(p.numel() for p in mixer.parameters())
    found = {key: tuple(tensor.shape) for key, tensor in whole_tensors(mixer).items()}
    assert found == {parameter.name: parameter.shape for parameter in mixer.spec.parameters(config)}
    assert mapping.num_parameters(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", MIXERS)
def test_tensor_parallel_ranks_hold_slices_that_make_up_the_whole(name):
    config = tiny_model_config((name,))
    slices = config.spec(name).layout_rules(config).tensor_slices.values()
    ranks = math.gcd(*slices)
    assert ranks > 1
    for parameter in config.spec(name).parameters(config):
        parts = ranks if parameter.tp_dim is not None else 1
        assert math.prod(parameter.local_shape(ranks)) * parts == parameter.numel


@pytest.mark.parametrize("name", MIXERS)
def test_flops_are_positive_and_recurrent_ones_do_not_grow_with_the_context(name):
    config = tiny_model_config((name,))
    spec = config.spec(name)
    short = spec.flops(config, 512).total
    long = spec.flops(config, 65536).total
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
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("ids", [None, document_ids((5, 6, 13), (12,), length=24)])
def test_context_parallel_ranks_compute_their_part_of_the_whole(name, size, ids):
    """Outputs and gradients of the inputs; each row of ids is a sequence, and a document begins
    inside chunks and at their border."""
    mixer = build(name).mixer(0)
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(24, 2, 24, generator=generator, dtype=torch.float64) for _ in range(2))
    half = torch.linspace(0, 3, 24 * 4, dtype=torch.float64).view(24, 1, 1, 4)
    angles = torch.cat((half, half), -1)

    def run(mixer, x, angles, weight):
        x = x.clone().requires_grad_()
        y, _ = mixer(x, rotary_pos_emb=angles, packed_seq_params=ids)
        parameters = list(mixer.parameters())
        return y.detach(), *torch.autograd.grad(y, [x, *parameters], weight)

    def one_rank(group):
        own = copy.copy(mixer)
        own.__dict__["context_group"] = group
        return run(own, *(local_part(part, group.rank(), size, 0) for part in (x, angles, weight)))

    want = run(mixer, x, angles, weight)
    ranks = on_ranks(size, one_rank)
    for index, whole in enumerate(want):
        parts = [found[index] for found in ranks]
        got = natural_order(parts, 0) if index < 2 else sum(parts)
        torch.testing.assert_close(got, whole, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", MIXERS)
def test_checkpoint_sections_tile_the_fused_projection(name):
    mixer = build(name).mixer(0)
    factory = mixer.sharded_state_dict("m.")["m.linear_in.weight"]
    assert torch.equal(
        factory.merge_fn({k: part.data for k, part in factory.build().items()}),
        mixer.linear_in.weight,
    )


@pytest.mark.parametrize("name", MIXERS)
def test_a_checkpoint_gives_back_every_weight_and_the_configuration(name, tmp_path):
    model = build(name, torch.float32)
    other = build_model(
        tiny_model_config((name, name)), ParallelConfig(), dtype=torch.float32, seed=7
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    write_weights(tmp_path / "c", whole_tensors(model), model.model_config, kind="student")
    load_model(other, tmp_path / "c")
    stored = whole_tensors(other)
    for key, tensor in whole_tensors(model).items():
        assert torch.equal(stored[key], tensor), key
    assert ModelConfig.from_json(model.model_config.to_json()) == model.model_config


@pytest.mark.parametrize("name", MIXERS)
def test_the_hugging_face_form_comes_back(name):
    """Names, shapes and values of every tensor come back, and config.json has the mixer's
    settings."""
    model = build(name, torch.float32)
    config = model.model_config
    raw = hf_config.hf_config_from_model(config, torch_dtype="float32")
    assert hf_config.model_config_from_hf(raw, where="x") == hf_settings(config)
    ours = whole_tensors(model)
    entries = mapping.entries(config)
    assert {entry.ours for entry in entries} == set(ours)
    for entry in entries:
        parts = entry.split(ours[entry.ours])
        assert all(tuple(part.shape) == entry.part_shape for part in parts.values())
        assert torch.equal(
            tensors.join(entry, [parts[part] for part in entry.hf]), ours[entry.ours]
        )


def hf_settings(config):
    """Return the configuration with the settings of its mixers written out."""
    return config.with_mixers(
        config.mixer_types, [config.spec(mixer) for mixer in config.used_mixers]
    )


def test_settings_travel_with_the_model(tmp_path):
    spec = toy_mixer.ToySpec(conv_size=5)
    config = tiny_teacher_config(2).converted(spec)
    assert config.spec(toy_mixer.NAME) == spec and '"conv_size": 5' in config.to_json()
    assert ModelConfig.from_json(config.to_json()) == config
    raw = hf_config.hf_config_from_model(config, torch_dtype="float32")
    assert raw["toy_conv_size"] == 5 and hf_config.model_config_from_hf(raw, where="x") == config
    assert build_model(config, ParallelConfig(), dtype=torch.float32).mixer(0).k_conv.shape[1] == 5
    assert config.with_mixers(("attn", "attn")).mixers == {}


@pytest.mark.parametrize("name", RECURRENT)
def test_memory_counts_the_mixers_own_parameters(name):
    teacher = tiny_teacher_config(2)
    student = teacher.converted(mixer_specs()[name]())
    (found,) = stage_memory(
        "align", teacher, student, stage_config(), ParallelConfig(), data_ranks=1
    )
    built = build_model(student, ParallelConfig(), dtype=torch.float32)
    trained = sum(p.numel() for layer in range(2) for p in built.mixer(layer).parameters())
    assert (
        found.weights == 2 * trained and found.optimizer == 12 * trained and found.activations > 0
    )


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_recurrent_mixers_take_over_attention_weights(name, heads, groups):
    shape = {"num_attention_heads": heads, "num_query_groups": groups}
    teacher = build_model(
        tiny_teacher_config(2, **shape), ParallelConfig(), dtype=torch.float64, seed=4
    )
    mixer = build(name, **shape).mixer(1)
    before = [p.clone() for p in mixer.parameters()]
    assert mixer.init_from_attention(teacher.mixer(1), seed=9) is mixer
    assert any(not torch.equal(a, b) for a, b in zip(before, mixer.parameters(), strict=True))
    assert torch.equal(mixer.linear_proj.weight, teacher.mixer(1).linear_proj.weight)
    again = build(name, **shape).mixer(1).init_from_attention(teacher.mixer(1), seed=9)
    assert all(
        torch.equal(a, b) for a, b in zip(mixer.parameters(), again.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", MIXERS)
def test_biases_are_parameters_like_the_others(name, tmp_path):
    """They are counted, get a gradient, are added to their sections alone, and are stored."""
    model = build(name, **NO_NORMS_BUT_BIASES)
    config = model.model_config
    mixer = model.mixer(0)
    found = {key: tuple(tensor.shape) for key, tensor in whole_tensors(mixer).items()}
    assert found == {parameter.name: parameter.shape for parameter in mixer.spec.parameters(config)}
    assert {"q_bias", "k_bias", "v_bias"} <= set(found)
    assert mapping.num_parameters(config) == sum(p.numel() for p in model.parameters())
    model(torch.randint(0, 61, (2, 9))).square().sum().backward()
    for key, parameter in mixer.named_parameters():
        # without norms and RoPE the bias of k shifts all scores of a query alike
        least = 0 if (name, key) == ("attn", "k_bias") else 1e-9
        assert parameter.grad is not None and parameter.grad.abs().max() >= least, key
    with torch.no_grad():
        for letter in "qkv":
            mixer.get_parameter(f"{letter}_bias").normal_()
        bias = mixer._bias()
        for section, part in zip(
            mixer.local_sections, bias.split(list(mixer.local_sections.values())), strict=True
        ):
            own = f"{section}_bias"
            assert torch.equal(part, getattr(mixer, own) if own in found else 0 * part), section
    raw = hf_config.hf_config_from_model(config, torch_dtype="float32")
    assert hf_config.model_config_from_hf(raw, where="x") == hf_settings(config)


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_mixers_take_over_biases_and_draw_norms_that_are_missing(name):
    teacher = build_model(
        tiny_teacher_config(2, **NO_NORMS_BUT_BIASES), ParallelConfig(), dtype=torch.float64, seed=4
    )
    attention = teacher.mixer(1)
    with torch.no_grad():
        for letter in "qkv":
            attention.get_parameter(f"{letter}_bias").normal_()
    mixer = build(name, **NO_NORMS_BUT_BIASES).mixer(1).init_from_attention(attention, seed=9)
    assert torch.equal(mixer.q_bias, attention.q_bias)
    for letter in "kv":
        mine, theirs = (one.get_parameter(f"{letter}_bias") for one in (mixer, attention))
        copies = len(mine) // len(theirs)
        heads = theirs.view(-1, mixer.head_dim).repeat_interleave(copies, dim=0)
        assert torch.equal(mine.view(-1, mixer.head_dim), heads)
    assert torch.equal(mixer.q_norm.weight, torch.ones_like(mixer.q_norm.weight))
    assert not hasattr(attention, "q_norm")


@pytest.mark.parametrize("name", RECURRENT)
def test_stage_one_trains_them_beside_a_teacher(name):
    teacher = build_model(tiny_teacher_config(2), ParallelConfig(), dtype=torch.float32, seed=4)
    aligned = AlignedMixers.from_teacher(teacher, mixer_specs()[name](), seed=1)
    assert aligned.model_config.used_mixers == (name,)
    assert {key.split("self_attention.")[1] for key in whole_tensors(aligned)} == {
        parameter.name
        for parameter in aligned.model_config.spec(name).parameters(aligned.model_config)
    }
