import pytest
import torch

from megatron_hypenet.parallel.context.layout import local_part
from megatron_hypenet.parallel.context.softmax import context_softmax_attn
from tests.dense_attention import dense_softmax, document_ids
from tests.threaded_ranks import on_ranks


def tensors(length, dtype=torch.float64):
    return [torch.randn(2, length, heads, 8, dtype=torch.float64).to(dtype) for heads in (4, 2, 2)]


@pytest.mark.parametrize("method", ["all_gather", "ring"])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(
    "ids", [None, document_ids((5, 6), (12,), length=24)], ids=["one", "documents"]
)
def test_ranks_hold_their_part_of_the_whole(method, size, ids):
    q, k, v = tensors(24)
    want = dense_softmax(q, k, v, 0.5, ids)

    def one_rank(group):
        local = [local_part(x, group.rank(), size, 1) for x in (q, k, v)]
        return context_softmax_attn(*local, scale=0.5, group=group, document_ids=ids, method=method)

    for rank, o in enumerate(on_ranks(size, one_rank)):
        torch.testing.assert_close(o, local_part(want, rank, size, 1), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("method", ["all_gather", "ring"])
def test_backward_keeps_local_tensors_only(method):
    """Memory between forward and backward does not grow with the number of ranks."""
    q, k, v = tensors(24)

    def one_rank(group):
        local = [local_part(x, group.rank(), 3, 1).clone().requires_grad_() for x in (q, k, v)]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.append(x.numel()) or x, lambda x: x
        ):
            context_softmax_attn(*local, scale=0.5, group=group, method=method)
        return sum(kept)

    query, key = q.numel() // 3, k.numel() // 3
    # q and o, k and v, one log-sum-exp per head
    assert set(on_ranks(3, one_rank)) == {2 * query + 2 * key + query // 8}


def test_one_rank_without_documents_is_torchs_causal_attention():
    q, k, v = tensors(6, torch.float32)
    (o,) = on_ranks(1, lambda group: context_softmax_attn(q, k, v, scale=0.5, group=group))
    torch.testing.assert_close(o, dense_softmax(q, k, v, 0.5))


def test_mistakes_are_refused():
    q, k, v = tensors(6)
    with pytest.raises(ValueError, match="'ulysses': known are all_gather, ring"):
        on_ranks(
            2, lambda group: context_softmax_attn(q, k, v, scale=1.0, group=group, method="ulysses")
        )
    with pytest.raises(ValueError, match="4 query heads cannot share 3"):
        on_ranks(
            1,
            lambda group: context_softmax_attn(q, q[:, :, :3], q[:, :, :3], scale=1.0, group=group),
        )
    with pytest.raises(ValueError, match="5 local tokens"):
        on_ranks(
            2,
            lambda group: context_softmax_attn(
                q[:, :5], k[:, :5], v[:, :5], scale=1.0, group=group
            ),
        )
    with pytest.raises(ValueError, match="document_ids has shape"):
        ids = torch.zeros(2, 6)
        on_ranks(
            2, lambda group: context_softmax_attn(q, k, v, scale=1.0, group=group, document_ids=ids)
        )
