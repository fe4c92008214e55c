"""FP8 products without gradients, against the same values multiplied in float64."""

import pytest
import torch

from megatron_hypenet.ops.fp8_linear import FP8, LARGEST, fp8_linear, torch_quantize_rows


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_row_uses_the_whole_range_and_is_off_by_half_a_digit_at_most():
    x = drawn(7, 64)
    x[2] *= 1e6
    x[3] *= 1e-6
    values, scale = torch_quantize_rows(x)
    assert values.dtype == FP8
    assert values.float().abs().amax(-1).tolist() == [LARGEST] * 7
    # e4m3 has three digits behind the leading one; below 2**-6 of its units they become fewer
    off = (values.float() * scale[:, None] - x).abs()
    assert bool((off <= torch.maximum(x.abs() / 16, scale[:, None] * 2**-10)).all())


def test_a_row_of_zeros_stays_zero_and_a_row_with_a_nan_is_noticed():
    x = drawn(3, 32)
    x[0] = 0.0
    x[1, 4] = torch.nan
    values, scale = torch_quantize_rows(x)
    assert scale[0] == 1 and values[0].float().eq(0).all()
    y = fp8_linear(x, *torch_quantize_rows(drawn(16, 32, seed=1)))
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48)])
def test_the_product_is_that_of_the_rounded_values(shape):
    x, weight = drawn(*shape), drawn(32, 48, seed=1)
    values, scale = torch_quantize_rows(weight)
    rows, row_scale = torch_quantize_rows(x.reshape(-1, 48))
    wanted = (rows.double() * row_scale.double()[:, None]) @ (
        values.double() * scale.double()[:, None]
    ).t()
    got = fp8_linear(x, values, scale)
    assert got.shape == (*shape[:-1], 32) and got.dtype == x.dtype
    torch.testing.assert_close(got.double().reshape(-1, 32), wanted, rtol=1e-5, atol=1e-5)
    # what rounding both sides to e4m3 does to a sum of 48 products: 3.7e-2
    exact = x.double().reshape(-1, 48) @ weight.double().t()
    assert float((wanted - exact).norm() / exact.norm()) < 5e-2
