"""The kernel runs on CUDA only. Everything around it (what is packed, in which shape, what comes
back) is tested against a stand-in that takes and returns what torch's kernel does; the kernel
itself against float64 where there is a GPU."""

from unittest import mock

import pytest
import torch

from megatron_hypenet.parallel.context import context_softmax_attn, flash
from megatron_hypenet.parallel.context.layout import local_part
from tests.dense_attention import dense_softmax, document_ids
from tests.threaded_ranks import on_ranks

DOCUMENTS = {
    "none": None,
    "random": document_ids((7, 30, 31, 40), (1, 19, 47), length=48),
    "chunk edges": document_ids((8, 16, 24, 32, 40), (4, 12), length=48),
    "one row whole": document_ids((), (5, 33), length=48),
    "every few tokens": document_ids(range(3, 48, 3), range(1, 48), length=48),
}


def sequences(q, k, bounds_q, bounds_k, max_q, max_k):
    """Index pairs of the sequences of a call, dense or packed, after the checks that the kernel
    makes."""
    assert q.stride(-1) == k.stride(-1) == 1 and q.shape[-2] % k.shape[-2] == 0
    if bounds_q is None:
        assert q.dim() == 4 and (max_q, max_k) == (q.shape[1], k.shape[1])
        return [(i, i) for i in range(q.shape[0])]
    assert (
        q.dim() == 3
        and bounds_q.dtype == bounds_k.dtype == torch.int32
        and bounds_q.shape == bounds_k.shape
    )
    spans = [
        [slice(*pair) for pair in zip(x.tolist(), x.tolist()[1:], strict=False)]
        for x in (bounds_q, bounds_k)
    ]
    assert (max_q, max_k) == tuple(max(s.stop - s.start for s in side) for side in spans)
    assert (spans[0][-1].stop, spans[1][-1].stop) == (q.shape[0], k.shape[0])
    return list(zip(*spans, strict=True))


def scores_of(q, k, causal, scale):
    """Return the scores [h, m, n] of one sequence, bottom-right causal."""
    scores = scale * torch.einsum(
        "ihd,jhd->hij", q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    )
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(k.shape[0] - q.shape[0] + 1)
    return scores.masked_fill(hidden, -torch.inf) if causal else scores


def kernel_forward(q, k, v, bounds_q, bounds_k, max_q, max_k, dropout, causal, debug, *, scale):
    o = torch.empty_like(q)
    log_sum = q.new_empty(
        (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
    )
    for mine, theirs in sequences(q, k, bounds_q, bounds_k, max_q, max_k):
        scores = scores_of(q[mine], k[theirs], causal, scale)
        value = v[theirs].repeat_interleave(q.shape[-2] // k.shape[-2], dim=1)
        o[mine] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), value)
        (log_sum[mine] if q.dim() == 4 else log_sum[:, mine]).copy_(scores.logsumexp(-1))
    return o, log_sum, None, None, None


def kernel_backward(
    grad,
    q,
    k,
    v,
    o,
    log_sum,
    bounds_q,
    bounds_k,
    max_q,
    max_k,
    dropout,
    causal,
    seed,
    offset,
    *,
    scale,
):
    assert (
        log_sum.is_contiguous()
        and grad.is_contiguous()
        and o.is_contiguous()
        and seed.dtype == torch.uint64
    )
    assert log_sum.shape == (
        (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
    )
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    per_group = q.shape[-2] // k.shape[-2]
    for mine, theirs in sequences(q, k, bounds_q, bounds_k, max_q, max_k):
        sums = log_sum[mine] if q.dim() == 4 else log_sum[:, mine]
        p = (scores_of(q[mine], k[theirs], causal, scale) - sums[..., None]).exp()
        key, value = (x[theirs].repeat_interleave(per_group, dim=1) for x in (k, v))
        delta = (grad[mine] * o[mine]).sum(-1).t()[..., None]
        d_scores = p * (torch.einsum("ihd,jhd->hij", grad[mine], value) - delta) * scale
        dq[mine] = torch.einsum("hij,jhd->ihd", d_scores, key)
        dk[theirs] = (
            torch.einsum("hij,ihd->jhd", d_scores, q[mine]).unflatten(1, (-1, per_group)).sum(2)
        )
        dv[theirs] = (
            torch.einsum("hij,ihd->jhd", p, grad[mine]).unflatten(1, (-1, per_group)).sum(2)
        )
    return dq, dk, dv


@pytest.mark.parametrize("method", ["all_gather", "ring"])
@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_both_methods_feed_the_kernel_what_it_needs(method, name, size):
    ids = DOCUMENTS[name]
    q, k, v, weight = (torch.randn(2, 48, heads, 8, dtype=torch.float64) for heads in (4, 2, 2, 4))
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    dense_softmax(*whole, 0.5, ids).backward(weight)

    def one_rank(group):
        local = [local_part(x, group.rank(), size, 1).clone().requires_grad_() for x in (q, k, v)]
        context_softmax_attn(
            *local, scale=0.5, group=group, document_ids=ids, method=method
        ).backward(local_part(weight, group.rank(), size, 1))
        return [x.grad for x in local]

    patches = {
        "supports": lambda q, documents: True,
        "_FORWARD": kernel_forward,
        "_BACKWARD": kernel_backward,
    }
    with mock.patch.multiple(flash, **patches):
        results = on_ranks(size, one_rank)
    for rank, grads in enumerate(results):
        for tensor, got, full in zip("qkv", grads, whole, strict=True):
            expected = local_part(full.grad, rank, size, 1)
            torch.testing.assert_close(
                got, expected, rtol=1e-9, atol=1e-11, msg=lambda m, tensor=tensor: f"d{tensor}: {m}"
            )


def test_the_stand_in_has_the_shapes_of_the_kernel():
    """torch knows the kernel's output shapes without a GPU (on its meta device)."""
    q, k = torch.randn(2, 6, 4, 8), torch.randn(2, 6, 2, 8)
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    for arguments in (
        (q, k, k, None, None, 6, 6, 0.0, True, False),
        (q.flatten(0, 1), k.flatten(0, 1), k.flatten(0, 1), bounds, bounds, 7, 7, 0.0, True, False),
    ):
        on_meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
        for got, want in zip(
            kernel_forward(*arguments, scale=1.0)[:2],
            flash._FORWARD(*on_meta, scale=1.0)[:2],
            strict=True,
        ):
            assert got.shape == want.shape


def test_the_kernel_is_for_cuda_and_narrow_dtypes():
    assert not flash.supports(torch.zeros(1, 2, 1, 8, dtype=torch.bfloat16), None)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["all_gather", "ring"])
@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_kernel_faces_float64_on_a_gpu(method, name, size):
    """Ranks are threads on one GPU; errors relative to the largest value, a few roundings of
    bf16."""
    ids = None if DOCUMENTS[name] is None else DOCUMENTS[name].repeat_interleave(32, dim=1).cuda()
    length = 48 * 32
    q, k, v, weight = (
        torch.randn(2, length, heads, 128, device="cuda").bfloat16() for heads in (8, 2, 2, 8)
    )
    whole = [x.double().cpu().requires_grad_() for x in (q, k, v)]
    want = dense_softmax(*whole, 128**-0.5, None if ids is None else ids.cpu())
    want.backward(weight.double().cpu())

    def one_rank(group):
        local = [local_part(x, group.rank(), size, 1).clone().requires_grad_() for x in (q, k, v)]
        o = context_softmax_attn(
            *local, scale=128**-0.5, group=group, document_ids=ids, method=method
        )
        o.backward(local_part(weight, group.rank(), size, 1))
        return [o.detach(), *(x.grad for x in local)]

    for rank, results in enumerate(on_ranks(size, one_rank)):
        for tensor, got, full in zip(
            ("o", "dq", "dk", "dv"), results, (want.detach(), *(x.grad for x in whole)), strict=True
        ):
            error = (
                got.double().cpu() - local_part(full, rank, size, 1)
            ).abs().max() / full.abs().max()
            assert error < 2**-7, (tensor, rank, error)
