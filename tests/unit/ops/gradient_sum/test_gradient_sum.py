import pytest
import torch

from megatron_hypenet.ops import gradient_sum as module
from megatron_hypenet.ops.gradient_sum import fused_gradient_sum, gradient_sum, kernel_fits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


class OnGpu(torch.Tensor):
    """A CPU tensor that takes the branches of a GPU's."""

    is_cuda = True


def summed(op, total, gradient, add):
    total = total.clone()
    op(total, gradient, add=add)
    return total


@pytest.mark.parametrize("op", [gradient_sum, fused_gradient_sum])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 7, 2048, 5000])
def test_every_bit_is_torchs(op, dtype, count):
    """Numbers of very different size, so that sums are rounded; tiny ones are not taken for
    zero."""
    if op is fused_gradient_sum:
        pytest.importorskip("triton")
    total, gradient = (
        torch.randn(count, device=DEVICE) * 10.0 ** torch.randint(-6, 4, (count,), device=DEVICE)
        for _ in range(2)
    )
    gradient = gradient.to(dtype)
    # the interpreter takes bf16 below the normal numbers for zero
    flushed = dtype == torch.bfloat16 and DEVICE == "cpu"
    gradient[1::7] = torch.finfo(dtype).smallest_normal / (1 if flushed else 4)
    total[1::14] = 0.0
    gradient[2::7] = -0.0
    gradient[3::7] = float("inf")
    assert torch.equal(
        summed(op, total, gradient, True).view(torch.int32), (total + gradient).view(torch.int32)
    )
    assert torch.equal(
        summed(op, total, gradient, False).view(torch.int32), gradient.float().view(torch.int32)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("start", "gap"), [(0, 1), (1, 0), (3, 2), (4, 4)])
def test_views_may_begin_anywhere_in_a_buffer(dtype, start, gap):
    """Only they are written: what lies before and behind keeps its numbers."""
    pytest.importorskip("triton")
    buffer = torch.randn(3000, device=DEVICE)
    gradients = torch.randn(3000, device=DEVICE).to(dtype)
    total, gradient = buffer[start : start + 2500], gradients[gap : gap + 2500]
    want = buffer.clone()
    want[start : start + 2500] += gradient
    fused_gradient_sum(total, gradient, add=True)
    assert torch.equal(buffer, want)
    want[start : start + 2500] = gradient
    fused_gradient_sum(total, gradient, add=False)
    assert torch.equal(buffer, want)


def test_another_number_of_gradients_is_refused():
    pytest.importorskip("triton")
    with pytest.raises(
        ValueError, match="a sum of 4 numbers and a gradient of 1 do not belong together"
    ):
        fused_gradient_sum(torch.zeros(4), torch.ones(1), add=True)


@pytest.mark.parametrize(
    ("total", "gradient", "runs"),
    [
        (torch.zeros(4), torch.ones(4).bfloat16(), True),
        (torch.zeros(4), torch.ones(4), True),
        (torch.zeros(4), torch.ones(8).bfloat16()[::2], False),
        (torch.zeros(8)[::2], torch.ones(4).bfloat16(), False),
        (torch.zeros(4), torch.ones(4).double(), False),
        (torch.zeros(4).bfloat16(), torch.ones(4).bfloat16(), False),
    ],
)
@pytest.mark.parametrize("add", [False, True])
def test_what_the_kernel_is_not_made_for_takes_torchs_way(monkeypatch, total, gradient, runs, add):
    calls = []
    monkeypatch.setattr(
        module, "fused_gradient_sum", lambda *args, **options: calls.append(options)
    )
    total = total.clone().as_subclass(OnGpu) if total.is_contiguous() else total.as_subclass(OnGpu)
    gradient_sum(total.zero_(), gradient.as_subclass(OnGpu), add=add)
    assert (
        calls == ([{"add": add}] if runs else []) and total.tolist() == [0.0 if runs else 1.0] * 4
    )


def test_float64_has_no_kernel():
    assert all(kernel_fits(dtype) for dtype in DTYPES) and not kernel_fits(torch.float64)
