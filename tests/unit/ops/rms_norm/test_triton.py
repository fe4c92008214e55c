"""The kernels launched directly: every row is worked on once, rows past the end are not read, sums
have one order."""

import pytest
import torch

pytest.importorskip("triton")

from megatron_hypenet.ops.rms_norm import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def exact(x, weight, dy, eps):
    x, weight = (a.double().requires_grad_() for a in (x, weight))
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy.double())


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 21])
@pytest.mark.parametrize("width", [20, 520, 1000])
def test_any_number_of_rows_per_program(monkeypatch, rows, width):
    monkeypatch.setattr(kernels, "BACKWARD_PROGRAMS", 4)
    x, dy, weight = (
        torch.randn(*shape, device=DEVICE) for shape in ((rows, width), (rows, width), (width,))
    )
    found = kernels.forward(x, weight, 1e-6), *kernels.backward(x, weight, dy, 1e-6)
    for got, want in zip(found, exact(x, weight, dy, 1e-6), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 4, 5, 21])
@pytest.mark.parametrize("width", [20, 520])
def test_any_number_of_rows_with_a_residual(monkeypatch, rows, width):
    monkeypatch.setattr(kernels, "BACKWARD_PROGRAMS", 4)
    x, residual, dy, dresidual = torch.randn(4, rows, width, device=DEVICE)
    weight = torch.randn(width, device=DEVICE)
    y, total = kernels.add_forward(x, residual, weight, 1e-6)
    found = y, *kernels.backward(total, weight, dy, 1e-6, dresidual)
    assert torch.equal(total, x + residual)
    want_y, want_dx, want_dweight = exact(total, weight, dy, 1e-6)
    for got, want in zip(found, (want_y, want_dx + dresidual, want_dweight), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5)


def test_rows_past_the_end_are_not_read(monkeypatch):
    """What follows the last row in memory is NaN."""
    monkeypatch.setattr(kernels, "BACKWARD_PROGRAMS", 4)
    memory = torch.full((3, 12, 40), float("nan"), device=DEVICE)
    x, dy, other = memory[:, :6, :30]
    x.normal_(), dy.normal_(), other.normal_()
    weight = torch.ones(30, device=DEVICE)
    outputs = [kernels.forward(x, weight, 0.0), *kernels.add_forward(x, other, weight, 0.0)]
    outputs += [*kernels.backward(x, weight, dy, 0.0), *kernels.backward(x, weight, dy, 0.0, other)]
    assert all(output.isfinite().all() for output in outputs)


def test_the_sum_over_rows_is_the_same_every_time(monkeypatch):
    monkeypatch.setattr(kernels, "BACKWARD_PROGRAMS", 8)
    x, dy, weight = (
        torch.randn(*shape, device=DEVICE) for shape in ((50, 2, 520), (50, 2, 520), (520,))
    )
    once = kernels.backward(x, weight, dy, 1e-6)
    assert all(
        torch.equal(a, b) for a, b in zip(once, kernels.backward(x, weight, dy, 1e-6), strict=True)
    )


def test_a_row_of_zeros_gives_zeros():
    x = torch.zeros(2, 520, device=DEVICE)
    weight = torch.ones(520, device=DEVICE)
    dx, dweight = kernels.backward(x, weight, torch.ones_like(x), 1e-6)
    assert not kernels.forward(x, weight, 1e-6).any() and not dweight.any()
    torch.testing.assert_close(dx, torch.full_like(x, 1e3))


def test_narrow_inputs_give_narrow_outputs():
    x = torch.randn(3, 1, 520, device=DEVICE).half()
    weight = torch.ones(520, device=DEVICE).half()
    outputs = [kernels.forward(x, weight, 1e-6), *kernels.backward(x, weight, x, 1e-6)]
    outputs += [*kernels.add_forward(x, x, weight, 1e-6), *kernels.backward(x, weight, x, 1e-6, x)]
    assert all(output.dtype == torch.float16 for output in outputs)


def test_rows_past_two_to_the_31_elements_are_found():
    """Three rows lie in a block of memory of which only their pages are touched."""
    apart = 2**30
    width = 16
    x = torch.empty(2 * apart + width, dtype=torch.float16, device=DEVICE).as_strided(
        (3, width), (apart, 1)
    )
    x.copy_(torch.randn(3, width))
    weight = torch.ones(width, device=DEVICE).half()
    far, near = (
        [
            kernels.forward(x, weight, 1e-6), *kernels.add_forward(x, x, weight, 1e-6),
            *kernels.backward(x, weight, x, 1e-6), *kernels.backward(x, weight, x, 1e-6, x),
        ]
        for x in (x, x.contiguous())
    )  # fmt: skip
    assert all(torch.equal(got, want) for got, want in zip(far, near, strict=True))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(takes_gib):
    takes_gib(13)
    rows = 131_072 * 8 + 1
    width = 2048
    x = torch.randn(1, width, device=DEVICE).bfloat16().expand(rows, -1).contiguous()
    weight = torch.randn(width, device=DEVICE).bfloat16()
    y = kernels.forward(x, weight, 1e-6)
    assert torch.equal(y[-1], y[0]) and torch.equal(y[:1], kernels.forward(x[:1], weight, 1e-6))
    dx, _ = kernels.backward(x, weight, y, 1e-6)
    assert torch.equal(dx[-1], dx[0]) and torch.equal(
        dx[:1], kernels.backward(x[:1], weight, y[:1], 1e-6)[0]
    )
