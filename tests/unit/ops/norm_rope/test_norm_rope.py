import pytest
import torch

from megatron_hypenet.ops.norm_rope import fused_norm_rope, norm_rope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def definition(x, weight, angles, eps):
    """Compute in float64 x / rms(x) * w, then turn each pair (i, i + d/2) by its angle."""
    normal = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    first, second = normal.chunk(2, -1)
    cos, sin = angles.double().cos().chunk(2, -1)[0], angles.double().sin().chunk(2, -1)[0]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def case(t=11, b=2, h=3, d=32):
    """Make x as a slice of a wider projection, angles up to position 200,000."""
    x = torch.randn(t, b, h * d + 16, device=DEVICE)[..., : h * d].unflatten(-1, (h, d))
    frequencies = 10000.0 ** -(torch.arange(d // 2) / (d // 2))
    half = (torch.arange(t) * 20000.0 / t)[:, None] * frequencies
    return (
        x,
        torch.randn(d, device=DEVICE),
        torch.cat((half, half), -1)[:, None, None].to(DEVICE),
        torch.randn(t, b, h, d, device=DEVICE),
    )


def gradients(op, x, weight, angles, dy, dtype):
    x, weight = x.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_()
    y = op(x, weight, angles, 1e-6)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy.to(dtype))]


@pytest.mark.parametrize("op", [norm_rope, fused_norm_rope])
@pytest.mark.parametrize("shape", [{}, {"t": 1, "b": 1, "h": 1, "d": 64}])
def test_matches_float64_with_gradients(op, shape):
    if op is fused_norm_rope:
        pytest.importorskip("triton")
    inputs = case(**shape)
    want = gradients(definition, *inputs, torch.float64)
    for got, exact in zip(gradients(op, *inputs, torch.float32), want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("op", [norm_rope, fused_norm_rope])
def test_without_angles_it_is_the_norm(op):
    if op is fused_norm_rope:
        pytest.importorskip("triton")
    x, weight, angles, dy = case()
    want = gradients(definition, x, weight, torch.zeros_like(angles), dy, torch.float64)
    for got, exact in zip(gradients(op, x, weight, None, dy, torch.float32), want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=2e-5)


def test_the_operators_have_right_fake_forms():
    pytest.importorskip("triton")
    from megatron_hypenet.ops.norm_rope import triton as kernels

    x, weight, angles, dy = case()
    angles = angles.reshape(x.shape[0], -1)
    checks = ("test_schema", "test_faketensor")
    for turned in (angles, None):
        torch.library.opcheck(kernels.forward_op, (x, weight, turned, 1e-6), test_utils=checks)
        torch.library.opcheck(kernels.backward_op, (x, weight, turned, dy, 1e-6), test_utils=checks)
