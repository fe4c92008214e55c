import itertools

import pytest
import torch
from torch.nn import functional as F

from .conftest import close, random, tokens
from .test_delta_hypenet import recurrence

SWITCHES = ("gdn_use_qk_norm", "gdn_use_rope", "gdn_use_gate")
TINY = {"num_hidden_layers": 2, "mixer_types": ["gdn", "attn"]}


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotated(x, theta=1e6):
    """Apply RoPE by complex numbers to x [b, h, t, d]."""
    d = x.shape[-1]
    angles = torch.arange(x.shape[2])[:, None] * theta ** (-torch.arange(0, d, 2).double() / d)
    pairs = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.cat([pairs.real, pairs.imag], -1)


def by_definition(weights, x, config):
    """Compute the layer of weights {name: tensor} on x [b, t, H], by its formulas."""
    d = config.head_dim
    q, k, v = (x @ weights[f"{name}_proj.weight"].T for name in "qkv")
    if config.gdn_activation is not None:
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
    q, k, v = (y.unflatten(-1, (-1, d)).transpose(1, 2) for y in (q, k, v))
    if config.gdn_use_qk_norm:
        q, k = rms(q, weights["q_norm.weight"]), rms(k, weights["k_norm.weight"])
    if config.gdn_use_rope:
        q, k = rotated(q), rotated(k)
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    heads = q.shape[1]
    of_group = [head * k.shape[1] // heads for head in range(heads)]
    k, v = k[:, of_group], v[:, of_group]
    beta = 2 * (x @ weights["b_proj.weight"].T).sigmoid().transpose(1, 2)
    rate = (1 + (x @ weights["a_proj.weight"].T + weights["dt_bias"]).exp()).log()
    g = (-weights["A_log"].exp() * rate).transpose(1, 2)[..., None]
    start = torch.zeros(x.shape[0], heads, d, d, dtype=x.dtype)
    o, _ = recurrence(q, k, v, g, beta, start)
    o = rms((o / d**0.5).transpose(1, 2), weights["o_norm.weight"]).flatten(2)
    if config.gdn_use_gate:
        gate = x @ weights["g_proj.weight"].T
        o = o * gate * gate.sigmoid()
    return o @ weights["o_proj.weight"].T


def run_layer(model, x):
    """Run the first mixer of `model` on x, whole and in pieces."""
    mixer = model.model.layers[0].self_attn
    step = model.model._step(x, None, None, None)
    whole = mixer(x, step, None)
    cache = model.model.new_cache()
    parts = [
        mixer(part, model.model._step(part, None, None, cache), cache.slots[0])
        for part in x.split([20, 1, 1, 48], dim=1)
    ]
    return whole, torch.cat(parts, 1)


@torch.no_grad()
@pytest.mark.parametrize(
    "on", [*itertools.product([False, True], repeat=3)], ids=lambda on: "".join(map(str, on))
)
@pytest.mark.parametrize(("activation", "groups"), [(None, 2), ("silu", 2), ("swish", 6)])
def test_every_switch_follows_the_formulas(make_model, on, activation, groups):
    switches = dict(zip(SWITCHES, on, strict=True))
    model = make_model(**TINY, **switches, gdn_activation=activation, gdn_nkv=groups)
    mixer = model.model.layers[0].self_attn
    x = random(2, 70, 32)
    weights = mixer.state_dict()
    assert weights["k_proj.weight"].shape == (8 * groups, 32)
    assert {"g_proj.weight", "q_norm.weight", "k_norm.weight"} & set(weights) == {
        name for name, there in (("g_proj.weight", on[2]), ("q_norm.weight", on[0]),
                                 ("k_norm.weight", on[0])) if there
    }  # fmt: skip
    want = by_definition(weights, x, model.config)
    for got in run_layer(model, x):
        close(got, want)


def test_defaults_are_the_reference_s(make_config):
    config = make_config(**TINY)
    assert (config.gdn_nh, config.gdn_nkv, config.gdn_activation) == (6, 2, None)
    assert not any(getattr(config, name) for name in (*SWITCHES, "gdn_use_short_conv"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gdn_use_short_conv": True}, "gdn_use_short_conv=True .supported: False"),
        ({"gdn_nh": 3}, "gdn_nh=3 .supported: 6"),
        ({"gdn_nkv": 3}, "gdn_nkv=3 .supported: 2 or 6"),
        ({"gdn_activation": True}, "gdn_activation=True .supported: None or 'silu'"),
        ({"gdn_use_rope": None}, "gdn_use_rope=None .supported: False or True"),
    ],
    ids=str,
)
def test_refuses_what_it_does_not_do(make_config, change, message):
    with pytest.raises(ValueError, match=message):
        make_config(**TINY, **change)
    # a model without such a layer does not read the key
    assert vars(make_config(**change)).items() >= change.items()


def test_grouped_heads_and_their_copies_survive_saving(make_model, tmp_path):
    for groups in (2, 6):
        model = make_model(**TINY, gdn_nkv=groups)
        model.save_pretrained(tmp_path / str(groups))
        again = type(model).from_pretrained(tmp_path / str(groups), dtype=torch.float64)
        assert again.config.gdn_nkv == groups
        with torch.no_grad():
            ids = tokens(1, 9)
            close(again(ids).logits, model(ids).logits)
