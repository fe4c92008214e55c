import pytest
import torch
import torch.nn.functional as F

from megatron_hypenet.ops.rms_norm import fused_rms_norm, kernel_fits, rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def triton_or_skip(request):
    if "op" in request.fixturenames and request.getfixturevalue("op") is fused_rms_norm:
        pytest.importorskip("triton")


def definition(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def gradients(op, x, weight, dy, dtype):
    inputs = [a.detach().to(dtype).requires_grad_() for a in (x, weight)]
    y = op(*inputs, 1e-6)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(dtype))]


@pytest.mark.parametrize("op", [rms_norm, fused_rms_norm])
@pytest.mark.parametrize("shape", [(9, 2, 520), (1, 1, 1000), (600, 16), (4, 512), (3, 0, 520), (1, 1)])
def test_matches_float64_with_gradients(op, shape):
    x, weight, dy = 3 * torch.randn(shape, device=DEVICE), torch.randn(shape[-1], device=DEVICE), torch.randn(shape, device=DEVICE)
    want = gradients(definition, x, weight, dy, torch.float64)
    for got, exact in zip(gradients(op, x, weight, dy, torch.float32), want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=2e-5)


LAYOUTS = {
    "batch first": lambda wide: wide.transpose(0, 1),
    "part of a projection": lambda wide: wide[..., 20:60],
    "batch first, part": lambda wide: wide.transpose(0, 1)[..., 20:60],
    "columns apart": lambda wide: wide[..., ::3],
    "one row for all": lambda wide: wide[:1, :1].expand(4, 6, 60),
}


@pytest.mark.parametrize("op", [rms_norm, fused_rms_norm])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_may_lie_anywhere_in_memory(op, layout):
    wide = torch.randn(4, 6, 60, device=DEVICE)
    x, dy = LAYOUTS[layout](wide), LAYOUTS[layout](torch.randn(4, 6, 60, device=DEVICE))
    weight = torch.randn(x.shape[-1], device=DEVICE)
    x.requires_grad_()  # the same layout reaches the kernel
    y = op(x, weight.requires_grad_(), 1e-6)
    assert y.is_contiguous() or op is rms_norm
    found = [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]
    for got, want in zip(found, gradients(definition, x, weight, dy, torch.float64), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("op", [rms_norm, fused_rms_norm])
def test_a_gradient_without_memory_of_its_own(op):
    """As `sum` gives it: one number for all."""
    x, weight, dy = torch.randn(5, 520, device=DEVICE), torch.randn(520, device=DEVICE), torch.ones((), device=DEVICE).expand(5, 520)
    for got, want in zip(gradients(op, x, weight, dy, torch.float32), gradients(definition, x, weight, dy, torch.float64), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5)


def test_the_kernel_keeps_its_inputs_and_returns_a_storage_of_its_own():
    """What is dropped and made again frees exactly the output."""
    pytest.importorskip("triton")
    kept, x, weight = [], torch.randn(3, 2, 520, device=DEVICE, requires_grad=True), torch.ones(520, device=DEVICE)
    with torch.autograd.graph.saved_tensors_hooks(lambda a: kept.append(a) or a, lambda a: a):
        y = fused_rms_norm(x, weight, 1e-6)
    assert [a.data_ptr() for a in kept] == [x.data_ptr(), weight.data_ptr()]
    assert not y._is_view() and y.untyped_storage().nbytes() == y.nbytes


@pytest.mark.parametrize("op", [rms_norm, fused_rms_norm])
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_one_of_the_two_may_need_no_gradient(op, frozen):
    x, weight, dy = torch.randn(5, 520, device=DEVICE), torch.randn(520, device=DEVICE), torch.randn(5, 520, device=DEVICE)
    _, dx, dweight = gradients(definition, x, weight, dy, torch.float64)
    trained, want = (weight, dweight) if frozen == "x" else (x, dx)
    trained.requires_grad_()
    op(x, weight, 1e-6).backward(dy)
    torch.testing.assert_close(trained.grad.double(), want, rtol=1e-4, atol=2e-5)
    assert (x if frozen == "x" else weight).grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_without_the_kernel_every_bit_is_torchs(dtype):
    x, weight = torch.randn(5, 2, 520).to(dtype), torch.randn(520).to(dtype)
    assert torch.equal(rms_norm(x, weight, 1e-6), F.rms_norm(x, (520,), weight, 1e-6))


@pytest.mark.parametrize(
    ("dtype", "width", "fits"),
    [
        (torch.bfloat16, 2048, True),
        (torch.float32, 520, True),
        (torch.float64, 2048, False),
        (torch.bfloat16, 128, False),
        (torch.bfloat16, 8192, True),
        (torch.bfloat16, 8193, False),
    ],
)
def test_whole_rows_of_narrow_dtypes_have_a_kernel(dtype, width, fits):
    assert kernel_fits(dtype, width) is fits


def test_the_operators_have_right_fake_forms():
    pytest.importorskip("triton")
    from megatron_hypenet.ops import rms_norm_kernels as kernels

    x, dy, weight = (
        torch.randn(2, 5, 520, device=DEVICE).transpose(0, 1),
        torch.randn(5, 2, 520, device=DEVICE),
        torch.ones(520, device=DEVICE),
    )
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels.forward_op, (x, weight, 1e-6), test_utils=checks)
    torch.library.opcheck(kernels.backward_op, (x, weight, dy, 1e-6), test_utils=checks)
