import pytest
import torch
import torch.nn.functional as F

from megatron_hypenet.ops.short_conv import short_conv


def drawn(t=11, channels=5, window=4):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, t, channels, generator=generator, dtype=torch.float64)
    weight = torch.randn(channels, window, generator=generator, dtype=torch.float64)
    return F.pad(x, (0, 0, window - 1, 0)).requires_grad_(), weight.requires_grad_()


def test_equals_torchs_convolution_with_gradients():
    x, weight = drawn()
    got = short_conv(x, weight)
    want = F.silu(F.conv1d(x.transpose(1, 2), weight[:, None], groups=5)).transpose(1, 2)
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(got)
    for mine, theirs in zip(
        torch.autograd.grad(got, (x, weight), dy),
        torch.autograd.grad(want, (x, weight), dy),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_documents_are_as_if_alone():
    x, weight = drawn()
    ids = torch.tensor([[0] * 5 + [1] * 6] * 2)
    got = short_conv(x, weight, F.pad(ids, (3, 0), value=-1))
    alone = short_conv(F.pad(x[:, 3 + 5 :], (0, 0, 3, 0)), weight)
    torch.testing.assert_close(got[:, 5:], alone)
    torch.testing.assert_close(got[:, :5], short_conv(x[:, : 3 + 5], weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_keeps_the_dtype_and_sums_in_float32(dtype):
    x, weight = (value.detach().to(dtype) for value in drawn())
    got = short_conv(x, weight)
    assert got.dtype == dtype
    want = short_conv(x.double(), weight.double())
    assert ((got - want).norm() / want.norm()) < {torch.bfloat16: 4e-3, torch.float32: 1e-6}[dtype]
