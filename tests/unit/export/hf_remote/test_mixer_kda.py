import itertools

import pytest
import torch

from megatron_hypenet.export.hf_remote.mixer_kda import short_convolution

from .conftest import close, random
from .test_delta_hypenet import recurrence
from .test_mixer_gdn import rms, rotated, run_layer

TINY = {"num_hidden_layers": 2, "mixer_types": ["kda", "attn"]}


def convolved(u, weight):
    """Compute y_t = silu(sum_j w_j u_(t - W + 1 + j)), zeros before: u [b, t, c], weight [c, 1,
    W]."""
    taps = weight.shape[2]
    out = torch.zeros_like(u)
    for t, j in itertools.product(range(u.shape[1]), range(taps)):
        if t - taps + 1 + j >= 0:
            out[:, t] += weight[:, 0, j] * u[:, t - taps + 1 + j]
    return out * out.sigmoid()


def by_definition(weights, x, config):
    """Compute the layer of weights {name: tensor} on x [b, t, H], by its formulas."""
    d = config.head_dim
    q, k, v = (x @ weights[f"{name}_proj.weight"].T for name in "qkv")
    if config.kda_use_conv:
        q, k, v = (
            convolved(y, weights[f"{name}_conv1d.weight"])
            for name, y in zip("qkv", (q, k, v), strict=True)
        )
    q, k, v = (y.unflatten(-1, (-1, d)).transpose(1, 2) for y in (q, k, v))
    if config.kda_use_qk_norm:
        q, k = rms(q, weights["q_norm.weight"]), rms(k, weights["k_norm.weight"])
    if config.kda_use_rope:
        q, k = rotated(q), rotated(k)
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    beta = (x @ weights["b_proj.weight"].T).sigmoid().transpose(1, 2)
    inner = x @ weights["f_a_proj.weight"].T @ weights["f_b_proj.weight"].T + weights["dt_bias"]
    rate = (1 + inner.exp()).log().unflatten(-1, (-1, d))
    g = (-weights["A_log"].exp() * rate).transpose(1, 2)
    start = torch.zeros(x.shape[0], q.shape[1], d, d, dtype=x.dtype)
    o, _ = recurrence(q, k, v, g, beta, start)
    o = rms((o / d**0.5).transpose(1, 2), weights["o_norm.weight"]).flatten(2)
    gate = x @ weights["g_a_proj.weight"].T @ weights["g_b_proj.weight"].T
    return (o * gate.sigmoid()) @ weights["o_proj.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("taps", [None, 2, 4])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("rope", [True, False])
def test_every_switch_follows_the_formulas(make_model, taps, qk_norm, rope):
    conv = {} if taps is None else {"kda_use_conv": True, "kda_conv_size": taps}
    model = make_model(**TINY, kda_use_qk_norm=qk_norm, kda_use_rope=rope, **conv)
    weights = model.model.layers[0].self_attn.state_dict()
    assert weights["A_log"].shape == (1, 1, 6, 1) and weights["dt_bias"].shape == (48,)
    assert ("q_norm.weight" in weights) == qk_norm
    for name in "qkv":
        weight = weights.get(f"{name}_conv1d.weight")
        assert weight is None if taps is None else weight.shape == (48, 1, taps)
    x = random(2, 70, 32)
    want = by_definition(weights, x, model.config)
    for got in run_layer(model, x):
        close(got, want)


def test_defaults_are_the_reference_s(make_config):
    config = make_config(**TINY)
    assert (config.kda_num_heads, config.kda_head_dim) == (6, 8) and config.kda_use_qk_norm
    assert not config.kda_use_rope and not config.kda_use_conv
    assert make_config(**TINY, kda_conv_size=None).kda_conv_size is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kda_use_conv": True}, "kda_conv_size=None .supported: 2 to 64"),
        ({"kda_use_conv": True, "kda_conv_size": 1}, "kda_conv_size=1 .supported: 2 to 64"),
        ({"kda_num_heads": 3}, "kda_num_heads=3 .supported: 6"),
        ({"kda_head_dim": 16}, "kda_head_dim=16 .supported: 8"),
        ({"kda_use_qk_norm": None}, "kda_use_qk_norm=None .supported: True or False"),
    ],
    ids=str,
)
def test_refuses_what_it_does_not_do(make_config, change, message):
    with pytest.raises(ValueError, match=message):
        make_config(**TINY, **change)


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_a_convolution_in_pieces_is_one_over_real_tokens(taps):
    """Padding stands anywhere, more of it than the window is long, and there are rows without a
    real token."""
    x = random(4, 23, 5)
    weight = random(5, taps, seed=1)
    real = torch.rand(4, 23, generator=torch.Generator().manual_seed(3)) > 0.5
    real[1, :8] = False
    real[2, 4:22] = False
    real[3] = True
    window = None
    found = []
    columns = [7, 1, 3, 1, 1, 10]
    for part, mask in zip(x.split(columns, 1), real.split(columns, 1), strict=True):
        y, window = short_convolution(part, weight, window, None if bool(mask.all()) else mask)
        assert window.shape == (4, taps - 1, 5) and torch.isfinite(y).all()
        found.append(y)
    got = torch.cat(found, 1)
    for row in range(4):
        alone = x[row, real[row]]
        padded = torch.cat([torch.zeros(taps - 1, 5, dtype=x.dtype), alone])
        want = sum(padded[tap : tap + len(alone)] * weight[:, tap] for tap in range(taps))
        close(got[row, real[row]], want)
        assert torch.equal(window[row], padded[len(padded) - taps + 1 :])


def test_a_padded_token_leaves_state_and_window_as_they_were(make_model):
    model = make_model(**TINY, kda_use_conv=True, kda_conv_size=4)
    mixer = model.model.layers[0].self_attn
    cache = model.model.new_cache()
    x = random(2, 9, 32)
    mixer(x, model.model._step(x, None, None, cache), cache.slots[0])
    before = cache.slots[0].state.clone(), cache.slots[0].window.clone()
    for count in (1, 3):
        mask = torch.zeros(2, count)
        mask[0] = 1
        new = random(2, count, 32, seed=count)
        mixer(new, model.model._step(new, mask.bool(), None, cache), cache.slots[0])
        for kept, then in zip((cache.slots[0].state, cache.slots[0].window), before, strict=True):
            torch.testing.assert_close(kept[1], then[1], rtol=0, atol=1e-15)
            assert not torch.allclose(kept[0], then[0])


def test_the_window_keeps_no_more_than_it_needs(make_model):
    model = make_model(**TINY, kda_use_conv=True, kda_conv_size=4)
    cache = model.model.new_cache()
    x = random(1, 200, 32)
    model.model.layers[0].self_attn(x, model.model._step(x, None, None, cache), cache.slots[0])
    window = cache.slots[0].window
    assert window.untyped_storage().nbytes() == window.numel() * window.element_size()
