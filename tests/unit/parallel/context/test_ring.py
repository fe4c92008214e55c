import pytest
import torch

from megatron_hypenet.parallel.context.blocks import attend, merge
from megatron_hypenet.parallel.context.layout import local_part
from megatron_hypenet.parallel.context.ring import ring_attention, ring_step
from tests.dense_attention import dense_softmax
from tests.threaded_ranks import on_ranks


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_steps_of_all_ranks_cover_the_causal_triangle_once_and_evenly(size):
    c = 2
    count = torch.zeros(2 * size * c, 2 * size * c, dtype=torch.int64)
    for rank in range(size):
        mine = local_part(torch.arange(2 * size * c), rank, size, 0)
        costs = []
        for source in range(size):
            queries, keys, block = ring_step(rank, source, size, c)
            rows = mine[queries]
            columns = local_part(torch.arange(2 * size * c), source, size, 0)[keys]
            assert rows.tolist() == [i for span in block.queries for i in range(*span)]
            assert columns.tolist() == [i for span in block.keys for i in range(*span)]
            visible = rows[:, None] >= columns[None, :]
            assert block.causal or visible.all()
            count[rows[:, None], columns[None, :]] += visible
            costs.append(rows.numel() * columns.numel())
        assert set(costs[:rank] + costs[rank + 1 :]) == {2 * c * c}
    assert torch.equal(count, torch.ones_like(count).tril())


def test_merged_blocks_are_one_softmax_and_blocks_without_keys_change_nothing():
    scores = torch.randn(1, 1, 3, 8).double() * 20
    values = torch.randn(8, 4).double()
    parts = [(scores[..., keys], values[keys]) for keys in (slice(0, 3), slice(3, 8))]
    (o, log_sum), (o_2, log_sum_2) = [
        ((s.softmax(-1) @ x).transpose(1, 2), s.logsumexp(-1)) for s, x in parts
    ]
    merge(o, log_sum, o_2, log_sum_2)
    torch.testing.assert_close(o.transpose(1, 2), scores.softmax(-1) @ values)
    torch.testing.assert_close(log_sum, scores.logsumexp(-1))
    before = o.clone(), log_sum.clone()
    merge(o, log_sum, torch.zeros_like(o), torch.full_like(log_sum, -torch.inf))
    assert torch.equal(o, before[0]) and torch.equal(log_sum, before[1])


def test_merging_through_views_reaches_the_whole():
    """The ring updates the late half of its outputs alone."""
    block = ring_step(0, 0, 1, 2).block
    q, k, v = torch.randn(3, 1, 4, 2, 4).double().unbind(0)
    o, log_sum = attend(q, k, v, block, scale=1.0, documents=None)
    early = o[:, :2].clone()
    merge(
        o[:, 2:],
        log_sum[:, :, 2:],
        torch.ones(1, 2, 2, 4).double(),
        torch.full((1, 2, 2), 1e3).double(),
    )
    assert torch.equal(o[:, :2], early) and torch.equal(o[:, 2:], torch.ones(1, 2, 2, 4).double())
    assert torch.equal(log_sum[:, :, 2:], torch.full((1, 2, 2), 1e3).double())


def test_gradients_come_home_after_a_round():
    q, k, v = (torch.randn(2, 12, h, 4).double() for h in (4, 2, 2))
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    dense_softmax(*whole, 0.5).square().sum().backward()

    def one_rank(group):
        local = [local_part(x, group.rank(), 3, 1).clone().requires_grad_() for x in (q, k, v)]
        ring_attention(*local, scale=0.5, group=group, documents=None).square().sum().backward()
        return [x.grad for x in local]

    for rank, grads in enumerate(on_ranks(3, one_rank)):
        for got, full in zip(grads, whole, strict=True):
            torch.testing.assert_close(got, local_part(full.grad, rank, 3, 1))
