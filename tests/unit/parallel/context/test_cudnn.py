"""The kernel runs on CUDA only. Everything around it (its blocks, their shapes, what comes back) is
tested against a stand-in that aligns causal blocks top-left, as cuDNN does; the kernel itself
against float64 where there is a GPU."""

from unittest import mock

import pytest
import torch

from megatron_hypenet.parallel.context import context_softmax_attn, cudnn
from megatron_hypenet.parallel.context.layout import local_part
from tests.dense_attention import dense_softmax
from tests.threaded_ranks import on_ranks


def scores_of(q, k, causal, scale):
    """Return the scores [b, h, m, n], top-left causal."""
    scores = scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(-1, -2)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf) if causal else scores


def kernel_forward(q, k, v, bias, wants_log_sum, dropout, causal, debug, *, scale):
    assert bias is None and wants_log_sum and dropout == 0.0
    scores = scores_of(q, k, causal, scale)
    o = scores.softmax(-1) @ v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return o, scores.logsumexp(-1, keepdim=True), None, None, 0, 0, None, None, None


def kernel_backward(
    grad, q, k, v, o, log_sum, seed, offset, bias, bounds_q, bounds_k, m, n, dropout, causal,
    *, scale,
):  # fmt: skip
    assert log_sum.shape == (*q.shape[:3], 1) and log_sum.is_contiguous()
    assert (m, n) == (q.shape[2], k.shape[2])
    groups = (-1, q.shape[1] // k.shape[1])
    p = (scores_of(q, k, causal, scale) - log_sum).exp()
    key, value = (x.repeat_interleave(groups[1], dim=1) for x in (k, v))
    delta = (grad * o).sum(-1, keepdim=True)
    d_scores = p * (grad @ value.transpose(-1, -2) - delta) * scale
    dk = (d_scores.transpose(-1, -2) @ q).unflatten(1, groups).sum(2)
    dv = (p.transpose(-1, -2) @ grad).unflatten(1, groups).sum(2)
    return d_scores @ key, dk, dv


@pytest.mark.parametrize("method", ["all_gather", "ring"])
@pytest.mark.parametrize("size", [2, 4])
def test_every_block_without_documents_suits_the_kernel(method, size):
    q, k, v, weight = (torch.randn(2, 48, heads, 8, dtype=torch.float64) for heads in (4, 2, 2, 4))
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    want = dense_softmax(*whole, 0.5)
    want.backward(weight)

    def suits(q, k, *, causal):
        assert not causal or q.shape[1] == k.shape[1], "a causal block that is not square"
        return True

    def one_rank(group):
        local = [local_part(x, group.rank(), size, 1).clone().requires_grad_() for x in (q, k, v)]
        o = context_softmax_attn(*local, scale=0.5, group=group, method=method)
        o.backward(local_part(weight, group.rank(), size, 1))
        return [o.detach(), *(x.grad for x in local)]

    patches = {"supports": suits, "_FORWARD": kernel_forward, "_BACKWARD": kernel_backward}
    with mock.patch.multiple(cudnn, **patches):
        results = on_ranks(size, one_rank)
    for rank, found in enumerate(results):
        expected = [want.detach(), *(x.grad for x in whole)]
        for got, full in zip(found, expected, strict=True):
            torch.testing.assert_close(got, local_part(full, rank, size, 1), rtol=1e-9, atol=1e-11)


def test_the_stand_in_has_the_shapes_of_the_kernel():
    """torch knows the kernel's output shapes without a GPU (on its meta device)."""
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    on_meta = [x.to("meta") for x in (q, k, k)]
    rest = (None, True, 0.0, True, False)
    got = kernel_forward(q, k, k, *rest, scale=1.0)
    want = cudnn._FORWARD(*on_meta, *rest, scale=1.0)
    assert got[0].shape == want[0].shape


def test_the_kernel_is_for_cuda_and_narrow_dtypes():
    assert not cudnn.supports(*[torch.zeros(1, 2, 1, 8, dtype=torch.bfloat16)] * 2, causal=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "causal"), [(512, 512, True), (256, 512, False)])
def test_the_kernel_faces_float64_on_a_gpu(m, n, causal):
    """Output, log-sum-exp, and gradients of one block alone are compared, relative to the largest
    value."""
    q, grad = (torch.randn(1, m, 16, 128, device="cuda").bfloat16() for _ in range(2))
    k, v = (torch.randn(1, n, 8, 128, device="cuda").bfloat16() for _ in range(2))
    assert cudnn.supports(q, k, causal=causal)
    how = {"causal": causal, "scale": 128**-0.5}
    o, log_sum = cudnn.forward(q, k, v, **how)
    gradients = cudnn.backward(grad, q, k, v, o, log_sum, **how)
    exact = [x.double().cpu().transpose(1, 2) for x in (q, k, v)]
    rest = (None, True, 0.0, causal, False)
    want_o, want_sum, *_ = kernel_forward(*exact, *rest, scale=how["scale"])
    want = kernel_backward(
        grad.double().cpu().transpose(1, 2), *exact, want_o, want_sum, None, None, None, None, None,
        m, n, 0.0, causal, scale=how["scale"],
    )  # fmt: skip
    assert (log_sum.double().cpu() - want_sum.squeeze(-1)).abs().max() < 1e-3
    pairs = zip((o, *gradients), (want_o, *want), strict=True)
    for got, full in pairs:
        error = (got.double().cpu() - full.transpose(1, 2)).abs().max() / full.abs().max()
        assert error < 2e-2
