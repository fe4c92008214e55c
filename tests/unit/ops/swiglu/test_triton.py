"""The kernels launched directly: every element is written, wherever its row lies."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from megatron_hypenet.ops.swiglu import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("width", [1, 5, 16, 31, 40])
def test_several_blocks_of_columns_cover_each_row(monkeypatch, width):
    monkeypatch.setattr(kernels, "BLOCK", 16)
    x = torch.randn(7, 3, 2 * width, device=DEVICE)
    dy = torch.randn(7, 3, width, device=DEVICE)
    want_x = x.double().requires_grad_()
    gate, up = want_x.chunk(2, dim=-1)
    want = F.silu(gate) * up
    want.backward(dy.double())
    torch.testing.assert_close(kernels.forward(x).double(), want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kernels.backward(x, dy).double(), want_x.grad, rtol=1e-5, atol=1e-6)


def test_narrow_inputs_give_narrow_outputs():
    x = torch.randn(3, 1, 20, device=DEVICE).half()
    assert kernels.forward(x).dtype == kernels.backward(x, x[..., :10]).dtype == torch.float16


def test_rows_past_two_to_the_31_elements_are_found():
    """Three rows lie in a block of memory of which only their pages are touched."""
    apart = 2**30
    width = 16
    x = torch.empty(2 * apart + 2 * width, dtype=torch.float16, device=DEVICE).as_strided(
        (3, 2 * width), (apart, 1)
    )
    x.copy_(torch.randn(3, 2 * width))
    dy = torch.randn(3, width, device=DEVICE).half()
    assert torch.equal(kernels.forward(x), kernels.forward(x.contiguous()))
    assert torch.equal(kernels.backward(x, dy), kernels.backward(x.contiguous(), dy))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(takes_gib):
    takes_gib(16)
    rows = 131_072
    width = 12_288
    x = torch.randn(1, 2 * width, device=DEVICE).bfloat16().expand(rows, -1).contiguous()
    y = kernels.forward(x)
    assert torch.equal(y[-1], y[0]) and torch.equal(y[-1:], kernels.forward(x[:1]))
    dx = kernels.backward(x, y)
    assert torch.equal(dx[-1], dx[0]) and torch.equal(dx[-1:], kernels.backward(x[:1], y[:1]))
