import pytest
import torch
import torch.nn.functional as F

from megatron_hypenet.ops.swiglu import fused_swiglu, kernel_fits, swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def definition(x):
    gate, up = x.chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def plain(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def gradients(op, x, dy, dtype):
    x = x.detach().to(dtype).requires_grad_()
    y = op(x)
    y.backward(dy.to(dtype))
    return y.detach(), x.grad


@pytest.mark.parametrize("op", [swiglu, fused_swiglu])
@pytest.mark.parametrize(
    "shape", [(9, 2, 48), (1, 1, 2), (2, 2 * 1024), (3, 2 * 1500), (5, 2 * 7), (0, 8)]
)
def test_matches_float64_with_gradients(op, shape):
    if op is fused_swiglu:
        pytest.importorskip("triton")
    x = 3 * torch.randn(shape, device=DEVICE)
    dy = torch.randn(*shape[:-1], shape[-1] // 2, device=DEVICE)
    want = gradients(definition, x, dy, torch.float64)
    for got, exact in zip(gradients(op, x, dy, torch.float32), want, strict=True):
        assert got.is_contiguous()
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("op", [swiglu, fused_swiglu])
def test_far_from_zero_it_is_the_product_or_nothing(op):
    if op is fused_swiglu:
        pytest.importorskip("triton")
    x = torch.tensor([[-200.0, 200.0, 3.0, 3.0]], device=DEVICE, requires_grad=True)
    y = op(x)
    y.sum().backward()
    assert y.tolist() == [[0.0, 600.0]] and x.grad.tolist() == [[0.0, 3.0, 0.0, 200.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_the_kernel_every_bit_is_that_of_torchs_operations(dtype):
    x, dy = torch.randn(40, 2, 46).to(dtype), torch.randn(40, 2, 23).to(dtype)
    for got, want in zip(
        gradients(swiglu, x, dy, dtype), gradients(plain, x, dy, dtype), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("op", [swiglu, fused_swiglu])
def test_rows_may_lie_anywhere_in_memory(op):
    if op is fused_swiglu:
        pytest.importorskip("triton")
    wide = torch.randn(4, 6, 60, device=DEVICE)
    dy = torch.ones(1, 1, 1, device=DEVICE).expand(6, 4, 10)
    for x in (wide.transpose(0, 1)[..., 20:40], wide.permute(1, 0, 2)[..., ::3]):
        for got, want in zip(
            gradients(op, x, dy, torch.float32), gradients(plain, x, dy, torch.float64), strict=True
        ):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", [swiglu, fused_swiglu])
def test_only_the_input_is_kept(op):
    if op is fused_swiglu:
        pytest.importorskip("triton")
    kept = []
    x = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda a: kept.append(a) or a, lambda a: a):
        op(x)
    assert [a.data_ptr() for a in kept] == [x.data_ptr()]


def test_float64_has_no_kernel():
    assert (
        kernel_fits(torch.bfloat16)
        and kernel_fits(torch.float32)
        and not kernel_fits(torch.float64)
    )


def test_the_operators_have_right_fake_forms():
    pytest.importorskip("triton")
    from megatron_hypenet.ops.swiglu import triton as kernels

    x, dy = torch.randn(5, 2, 16, device=DEVICE), torch.randn(5, 2, 8, device=DEVICE)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels.forward_op, (x,), test_utils=checks)
    torch.library.opcheck(kernels.backward_op, (x, dy), test_utils=checks)
