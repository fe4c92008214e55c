import pytest
import torch

from megatron_hypenet.ops.sigmoid_gate import fused_sigmoid_gate, kernel_fits, sigmoid_gate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def definition(x, gate):
    return x / (1 + torch.exp(-gate))


def gradients(op, x, gate, dy, dtype):
    x, gate = (a.detach().to(dtype).requires_grad_() for a in (x, gate))
    y = op(x, gate)
    return [y.detach(), *torch.autograd.grad(y, (x, gate), dy.to(dtype))]


def kernel(x, gate):
    pytest.importorskip("triton")
    return fused_sigmoid_gate(x, gate)


OPS = [sigmoid_gate, kernel]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(9, 2, 48), (1, 1, 1), (2, 1024), (3, 1500), (5, 7), (0, 8)])
def test_matches_float64_with_gradients(op, shape):
    x, gate, dy = (3 * torch.randn(shape, device=DEVICE) for _ in range(3))
    want = gradients(definition, x, gate, dy, torch.float64)
    for got, exact in zip(gradients(op, x, gate, dy, torch.float32), want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("op", OPS)
def test_a_gate_far_from_zero_is_open_or_shut(op):
    x = torch.tensor([2.0, 3.0], device=DEVICE, requires_grad=True)
    gate = torch.tensor([-200.0, 200.0], device=DEVICE, requires_grad=True)
    y = op(x, gate)
    y.sum().backward()
    assert (
        y.tolist() == [0.0, 3.0]
        and x.grad.tolist() == [0.0, 1.0]
        and gate.grad.tolist() == [0.0, 0.0]
    )


@pytest.mark.parametrize("op", OPS)
def test_rows_may_lie_anywhere_in_memory(op):
    wide = torch.randn(4, 6, 60, device=DEVICE)
    dy = torch.ones(1, 1, 1, device=DEVICE).expand(6, 4, 20)
    x = wide.transpose(0, 1)[..., 20:40]
    gate = wide.permute(1, 0, 2)[..., ::3]
    for got, want in zip(
        gradients(op, x, gate, dy, torch.float32),
        gradients(definition, x, gate, dy, torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_the_kernel_keeps_its_inputs_alone():
    kept = []
    (x, gate) = torch.randn(2, 3, 8, device=DEVICE, requires_grad=True).unbind()
    with torch.autograd.graph.saved_tensors_hooks(lambda a: kept.append(a) or a, lambda a: a):
        kernel(x, gate)
    assert [a.data_ptr() for a in kept] == [x.data_ptr(), gate.data_ptr()]


def test_float64_has_no_kernel():
    assert (
        kernel_fits(torch.bfloat16)
        and kernel_fits(torch.float32)
        and not kernel_fits(torch.float64)
    )


def test_the_operators_have_right_fake_forms():
    pytest.importorskip("triton")
    from megatron_hypenet.ops.sigmoid_gate import triton as kernels

    x, gate, dy = torch.randn(3, 5, 2, 16, device=DEVICE).unbind()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels.forward_op, (x, gate), test_utils=checks)
    torch.library.opcheck(kernels.backward_op, (x, gate, dy), test_utils=checks)
