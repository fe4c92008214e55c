import pytest
import torch

from megatron_hypenet.ops.gated_norm import fused_gated_norm, gated_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def definition(x, gate, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight * torch.sigmoid(gate)


def case(t=9, b=2, n=48):
    """Make x with the batch outermost in memory, the gate a slice of a wider projection."""
    x = torch.randn(b, t, n, device=DEVICE).transpose(0, 1)
    gate = torch.randn(t, b, 2 * n, device=DEVICE)[..., n:]
    return x, gate, torch.randn(n, device=DEVICE), torch.randn(t, b, n, device=DEVICE)


def gradients(op, x, gate, weight, dy, dtype):
    inputs = [a.detach().to(dtype).requires_grad_() for a in (x, gate, weight)]
    y = op(*inputs, 1e-6)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(dtype))]


@pytest.mark.parametrize("op", [gated_norm, fused_gated_norm])
@pytest.mark.parametrize("shape", [{}, {"t": 1, "b": 1, "n": 1}, {"t": 600, "b": 1, "n": 16}])
def test_matches_float64_with_gradients(op, shape):
    if op is fused_gated_norm:
        pytest.importorskip("triton")
    inputs = case(**shape)
    want = gradients(definition, *inputs, torch.float64)
    for got, exact in zip(gradients(op, *inputs, torch.float32), want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=2e-5)


def test_the_operators_have_right_fake_forms():
    pytest.importorskip("triton")
    from megatron_hypenet.ops.gated_norm import triton as kernels

    x, gate, weight, dy = case()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels.forward_op, (x, gate, weight, 1e-6), test_utils=checks)
    torch.library.opcheck(kernels.backward_op, (x, gate, weight, dy, 1e-6), test_utils=checks)
