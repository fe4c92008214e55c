"""The kernel of `quantize_rows` against rounding in torch, natively: Triton's interpreter rounds
FP8 in another way."""

import pytest
import torch

from megatron_hypenet.ops.fp8_linear import FP8, quantize_rows, torch_quantize_rows
from megatron_hypenet.ops.selftest import check_fp8_rows


@pytest.mark.gpu
@pytest.mark.parametrize("width", [16, 96, 1234, 6144])
def test_scales_and_values_are_those_of_the_definition(width):
    found = check_fp8_rows(torch.device("cuda"), torch.bfloat16, width=width)
    assert found.ok, found


@pytest.mark.gpu
def test_rows_that_are_not_adjacent_and_rows_without_a_number():
    x = torch.randn(8, 96, device="cuda").bfloat16()
    x[3, 5] = torch.nan
    values, scales = quantize_rows(x[:, :32])
    wanted, expected = torch_quantize_rows(x[:, :32].contiguous())
    assert values.dtype == FP8 and values.is_contiguous()
    good = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(scales, expected, equal_nan=True)
    off = (values[good].float() - wanted[good].float()).abs() / 448
    assert off.mean() < 1e-3
    assert scales[3].isnan()
