import math

import pytest
import torch

from megatron_hypenet.export.hf_remote import ops_hypenet as remote

from .conftest import close, random


@pytest.mark.parametrize("setting", ["hype 1", "log", True, "hype 5 5"])
def test_settings_of_the_logit_scaling_that_make_no_sense(setting):
    with pytest.raises(ValueError, match="attn_logits_scaling"):
        remote.hype_constant(setting)


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
