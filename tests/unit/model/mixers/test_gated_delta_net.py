"""Against the written formulas (HypeNet reference, mixer gdn) over the naive recurrence."""

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_hypenet.config.mixers.gated_delta_net import GatedDeltaNetSpec
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.model.hypenet import build_model
from megatron_hypenet.ops.gated_delta_rule import naive_gated_delta_rule
from megatron_hypenet.ops.rope import apply_rope
from tests.tiny import tiny_model_config, tiny_teacher_config

NAME = "gated_delta_net"


def mixer_of(spec=None, dtype=torch.float64):
    config = tiny_model_config((NAME,))
    if spec is not None:
        config = config.with_mixers((NAME,), (spec,))
    return build_model(config, ParallelConfig(), dtype=dtype, seed=1).mixer(0)


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize(
    "spec",
    [
        GatedDeltaNetSpec(),
        GatedDeltaNetSpec(expand_kv=True, gate=False, activation="silu"),
        GatedDeltaNetSpec(qk_norm=False),
        GatedDeltaNetSpec(rope=False),
    ],
    ids=["default", "expanded, no gate, silu", "no norm", "no rope"],
)
def test_forward_is_the_written_formula(spec):
    mixer = mixer_of(spec)
    x = torch.randn(70, 2, 24, dtype=torch.float64)
    angles = torch.randn(70, 1, 1, 8, dtype=torch.float64)
    project = {name: F.linear(x, mixer.section_weight(name)) for name in mixer.local_sections}
    activated = {
        name: F.silu(project[name]) if spec.activation else project[name] for name in "qkv"
    }
    q, k, v = (activated[name].unflatten(-1, (-1, 8)) for name in "qkv")
    if spec.qk_norm:
        q, k = rms(q), rms(k)
    if spec.rope:
        q, k = apply_rope(q, angles), apply_rope(k, angles)
    q, k = unit(q), unit(k)
    copies = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(copies, 2), v.repeat_interleave(copies, 2)
    decay = -mixer.A_log.exp() * F.softplus(project["decay"] + mixer.dt_bias)
    beta = 2 * torch.sigmoid(project["beta"])
    o, _ = naive_gated_delta_rule(
        *(part.transpose(0, 1) for part in (q, k, v, decay, beta)), scale=1 / math.sqrt(8)
    )
    o = rms(o.transpose(0, 1)).flatten(-2)
    if spec.gate:
        o = o * F.silu(project["gate"])
    torch.testing.assert_close(mixer(x, rotary_pos_emb=angles)[0], o @ mixer.linear_proj.weight.t())


def test_casting_the_model_leaves_the_rates_exact():
    exact = mixer_of(dtype=torch.float32)
    mixer = mixer_of(dtype=torch.float32).bfloat16()
    assert mixer.linear_in.weight.dtype == torch.bfloat16
    for name in ("A_log", "dt_bias"):
        assert torch.equal(getattr(mixer, name), getattr(exact, name))
    assert list(dict(mixer.named_parameters())) == list(dict(exact.named_parameters()))
    assert mixer.double().A_log.dtype == torch.float64


def test_weight_transfer_keeps_the_groups_and_draws_the_rest():
    attention = build_model(
        tiny_teacher_config(1), ParallelConfig(), dtype=torch.float64, seed=3
    ).mixer(0)
    mixer = mixer_of().init_from_attention(attention, seed=5)
    for name in ("q", "k", "v"):
        assert torch.equal(mixer.section_weight(name), attention.section_weight(name))
    bound = 2**-2.5 * math.sqrt(6 / (24 + 6))
    decay = mixer.section_weight("decay")
    assert 0.5 * bound < decay.abs().max() <= bound
    assert (mixer.A_log.exp() <= 16).all()
    step = F.softplus(mixer.dt_bias)
    assert ((step > 0.0009) & (step < 0.11)).all()
    expanded = mixer_of(GatedDeltaNetSpec(expand_kv=True)).init_from_attention(attention, seed=5)
    assert torch.equal(expanded.section_weight("k")[8:16], attention.section_weight("k")[:8])
