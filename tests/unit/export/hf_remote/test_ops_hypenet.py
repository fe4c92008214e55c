import math
import sys

import pytest
import torch

from megatron_hypenet.config.rope import Llama3Scaling
from megatron_hypenet.export.hf_remote import ops_hypenet as remote
from megatron_hypenet.ops.rope import scaled_frequencies

from .conftest import close, random


@pytest.mark.parametrize("setting", ["hype 1", "log", True, "hype 5 5"])
def test_settings_of_the_logit_scaling_that_make_no_sense(setting):
    with pytest.raises(ValueError, match="attn_logits_scaling"):
        remote.hype_constant(setting)


def test_a_recurrence_computes_in_the_dtype_of_its_tensors_under_autocast():
    @remote.without_autocast
    def rule(x, y):
        """Return a product."""
        return x @ y, x

    x = random(40, 40).float()
    y = random(40, 40, seed=1).float()
    want = x @ y
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ y).dtype == torch.bfloat16
        assert torch.equal(rule(x, y)[0], want)
        assert torch.is_autocast_enabled("cpu")
    assert rule.__doc__ == "Return a product."


def test_a_torch_without_the_loop_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._higher_order_ops.scan", None)
    with pytest.raises(RuntimeError, match="export it with a fixed number"):
        remote.token_by_token(lambda state, x: (x, state), random(1), random(1, 1, 2, 3))


def test_the_loop_over_tokens_is_the_recurrence():
    x = random(2, 3, 5, 4)
    o, last = remote.token_by_token(
        lambda state, x: (x + state[:, :, None], state + x.squeeze(2)), random(2, 3, 4, seed=1), x
    )
    sums = x.cumsum(2) + random(2, 3, 4, seed=1)[:, :, None]
    close(o, sums)
    close(last, sums[:, :, -1])


def test_an_output_may_be_the_state_itself():
    class Sums(torch.nn.Module):
        def forward(self, x):
            def step(state, x):
                state = state + x.squeeze(2)
                return state[:, :, None], state

            zero = x[:, :, 0] * 0
            return remote.token_by_token(step, zero, x)[0]

    x = random(2, 3, 7, 4)
    shape = {2: torch.export.Dim("tokens", min=2, max=99)}
    exported = torch.export.export(Sums(), (x,), dynamic_shapes=(shape,)).module()
    close(exported(x[:, :, :5]), x[:, :, :5].cumsum(2))


def test_rope_rotates_halves_by_relative_position():
    cos, sin = remote.rope_tables(8, 100.0, torch.tensor([[5, 9]]), torch.float64)
    q = random(1, 1, 1, 8)
    k = random(1, 1, 1, 8, seed=1)
    turned_q = remote.rotate(q, cos[:, :, :1], sin[:, :, :1])
    turned_k = remote.rotate(k, cos[:, :, 1:], sin[:, :, 1:])
    angles = [4 * 100.0 ** (-2 * i / 8) for i in range(4)]
    pairs = [
        (q[..., i] + 1j * q[..., i + 4]).conj()
        * (k[..., i] + 1j * k[..., i + 4])
        * complex(math.cos(a), math.sin(a))
        for i, a in enumerate(angles)
    ]
    close((turned_q * turned_k).sum(), sum(pair.real for pair in pairs).sum())


def test_scaled_frequencies_are_those_of_the_training_model():
    settings = dict(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    )
    given = {"rope_type": "llama3", "rope_theta": 100.0, **settings}
    cos, sin = remote.rope_tables(
        16, 100.0, torch.tensor([[3]]), torch.float64, remote.llama3_scaling(given)
    )
    plain = 100.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    angles = 3 * scaled_frequencies(plain, 100.0, Llama3Scaling(**settings))
    close(cos[0, 0, 0], torch.cat((angles, angles)).cos())
    close(sin[0, 0, 0], torch.cat((angles, angles)).sin())


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_type": "yarn", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "default", "factor": 8.0},
        {"partial_rotary_factor": 0.5},
    ],
)
def test_other_scalings_are_refused(settings):
    with pytest.raises(ValueError, match="plain RoPE or that of Llama 3"):
        remote.llama3_scaling(settings)


def test_plain_rope_in_all_its_spellings():
    for settings in (None, {}, {"rope_type": "default", "rope_theta": 5.0}, {"type": None}):
        assert remote.llama3_scaling(settings) is None
    assert remote.llama3_scaling({"rope_theta": 5.0, "partial_rotary_factor": 1.0}) is None
