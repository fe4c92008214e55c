"""The kernels launched directly: every element is written, wherever its row lies."""

import pytest
import torch

pytest.importorskip("triton")

from megatron_hypenet.ops.sigmoid_gate import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("width", [1, 5, 16, 31, 40])
def test_several_blocks_of_columns_cover_each_row(monkeypatch, width):
    monkeypatch.setattr(kernels, "BLOCK", 16)
    x, gate, dy = torch.randn(3, 7, 3, width, device=DEVICE).unbind()
    leaves = [a.double().requires_grad_() for a in (x, gate)]
    want = leaves[0] * torch.sigmoid(leaves[1])
    want.backward(dy.double())
    torch.testing.assert_close(
        kernels.forward(x, gate).double(), want.detach(), rtol=1e-5, atol=1e-6
    )
    for got, leaf in zip(kernels.backward(x, gate, dy), leaves, strict=True):
        torch.testing.assert_close(got.double(), leaf.grad, rtol=1e-5, atol=1e-6)


def test_narrow_inputs_give_narrow_outputs():
    x, gate = torch.randn(2, 3, 1, 20, device=DEVICE).half().unbind()
    assert {a.dtype for a in (kernels.forward(x, gate), *kernels.backward(x, gate, x))} == {
        torch.float16
    }


def test_nothing_is_launched_for_no_numbers(monkeypatch):
    monkeypatch.setattr(kernels, "forward_kernel", None)
    monkeypatch.setattr(kernels, "backward_kernel", None)
    x = torch.zeros(0, 8, device=DEVICE)
    assert kernels.forward(x, x).shape == kernels.backward(x, x, x)[0].shape == (0, 8)
