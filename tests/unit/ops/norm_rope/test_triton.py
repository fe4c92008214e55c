"""The kernels launched directly: every element is written, rows past the end are not read."""

import pytest
import torch

pytest.importorskip("triton")

from megatron_hypenet.ops.norm_rope import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("t", [1, kernels.TOKENS, kernels.TOKENS + 1])
def test_zero_angles_leave_the_norm_alone(t):
    x = torch.randn(t, 1, 2, 32, device=DEVICE)
    weight = torch.rand(32, device=DEVICE) + 0.5
    y = kernels.forward(x, weight, torch.zeros(t, 32, device=DEVICE), 0.0)
    torch.testing.assert_close(
        y, torch.nn.functional.rms_norm(x, (32,), weight, 0.0), rtol=1e-5, atol=1e-5
    )
    dx, dweight = kernels.backward(x, weight, torch.zeros(t, 32, device=DEVICE), x, 0.0)
    assert dx.abs().max() < 1e9 and torch.isfinite(dweight).all()  # nothing is left unwritten


def test_narrow_inputs_give_narrow_outputs():
    x = torch.randn(3, 1, 2, 32, device=DEVICE).half()
    weight = torch.ones(32, device=DEVICE).half()
    dx, dweight = kernels.backward(x, weight, torch.zeros(3, 32, device=DEVICE), x, 1e-6)
    assert (
        kernels.forward(x, weight, torch.zeros(3, 32, device=DEVICE), 1e-6).dtype
        == dx.dtype
        == dweight.dtype
        == torch.float16
    )
