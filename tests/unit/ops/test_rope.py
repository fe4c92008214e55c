import math

import pytest
import torch

from megatron_hypenet.config.rope import Llama3Scaling, YarnScaling
from megatron_hypenet.ops.rope import apply_rope, scaled_frequencies


def angles(length, dim, start=0):
    frequency = 1.0 / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    half = torch.outer(torch.arange(start, start + length, dtype=torch.float64), frequency)
    return torch.cat((half, half), dim=-1)[:, None, None]


def test_position_zero_is_the_identity_and_norms_are_kept():
    x = torch.randn(5, 2, 3, 8, dtype=torch.float64)
    y = apply_rope(x, angles(5, 8))
    torch.testing.assert_close(y[0], x[0], rtol=0, atol=0)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


def test_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    q, k = q.expand(12, 1, 1, 16), k.expand(12, 1, 1, 16)
    near = (apply_rope(q, angles(12, 16))[7] * apply_rope(k, angles(12, 16))[3]).sum()
    far = (
        apply_rope(q, angles(12, 16, start=100))[7] * apply_rope(k, angles(12, 16, start=100))[3]
    ).sum()
    torch.testing.assert_close(near, far)


def test_dtype_of_the_input_is_kept():
    x = torch.randn(3, 1, 1, 4, dtype=torch.bfloat16)
    assert apply_rope(x, angles(3, 4).float()).dtype == torch.bfloat16


def llama3_by_cases(frequency, scaling):
    """Apply Llama 3.1's published rule, by its three cases of wavelengths."""
    wavelength = 2 * math.pi / frequency
    length = scaling.original_max_position_embeddings
    if wavelength < length / scaling.high_freq_factor:
        return frequency
    if wavelength > length / scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = length / wavelength - scaling.low_freq_factor
    smooth /= scaling.high_freq_factor - scaling.low_freq_factor
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


@pytest.mark.parametrize(
    ("dim", "base", "factor", "length"),
    [(64, 5e5, 8.0, 8192), (128, 5e5, 32.0, 8192), (8, 1e4, 2, 64)],
)
def test_llama3_stretches_long_wavelengths(dim, base, factor, length):
    scaling = Llama3Scaling(
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=length,
    )
    plain = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    want = [llama3_by_cases(frequency, scaling) for frequency in plain.tolist()]
    got = scaled_frequencies(plain, base, scaling)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-14, atol=0)
    assert got[0] == plain[0] and got[-1] < plain[-1]


@pytest.mark.parametrize(
    ("dim", "base", "length", "betas"),
    [
        (128, 1e6, 32768, {}),
        (64, 1e4, 2048, {"beta_fast": 16.0, "beta_slow": 2.0}),
        (8, 1e4, 32, {}),
    ],
)
def test_yarn_divides_slow_channels(dim, base, length, betas):
    scaling = YarnScaling(factor=4.0, original_max_position_embeddings=length, **betas)
    plain = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    def channel(turns):  # of which the wavelength has so many turns in the original context
        return dim / 2 * math.log(length / (2 * math.pi * turns), base)

    first = max(math.floor(channel(scaling.beta_fast)), 0)
    last = min(math.ceil(channel(scaling.beta_slow)), dim - 1)
    want = [
        frequency
        if index <= first
        else frequency / 4
        if index >= last
        else frequency * (1 - (index - first) / (last - first) * 0.75)
        for index, frequency in enumerate(plain.tolist())
    ]
    got = scaled_frequencies(plain, base, scaling)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-14, atol=0)
    assert got[0] == plain[0] and (got[-1] < plain[-1])
