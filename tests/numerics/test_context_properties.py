"""Context-parallel attention over random sizes of groups (also not powers of two), lengths, heads,
batches and documents, in float64.

Ranks are threads; the real code runs on each of them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hypenet.model.mixers.lightning_attn import context_lightning_attn
from megatron_hypenet.ops.decay import log_decay
from megatron_hypenet.parallel import context
from megatron_hypenet.parallel.context.layout import local_part
from tests.dense_attention import dense_lightning, dense_softmax, document_ids
from tests.threaded_ranks import on_ranks


@st.composite
def problems(draw):
    """Return shapes, documents and random tensors of one attention problem."""
    size = draw(st.integers(1, 5))
    length = 2 * size * draw(st.integers(1, 6))
    b, groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dk, dv = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    row = st.sets(st.integers(1, length), max_size=length).map(sorted)
    ids = None
    if draw(st.booleans()):
        # ids need not count
        ids = document_ids(*draw(st.lists(row, min_size=b, max_size=b)), length=length) * 3 + draw(
            st.integers(-2, 2)
        )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return (
        size,
        ids,
        lambda heads, d: torch.randn(b, length, heads, d, generator=generator, dtype=torch.float64),
        (groups, per_group, dk, dv),
    )


def assert_ranks_equal_whole(size, op, dense, q, k, v, weight):
    """Compare op(group, q, k, v) of local parts with dense(q, k, v) of whole tensors: outputs and
    all gradients."""
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    want = dense(*whole)
    want.backward(weight)

    def one_rank(group):
        local = [local_part(x, group.rank(), size, 1).clone().requires_grad_() for x in (q, k, v)]
        o = op(group, *local)
        o.backward(local_part(weight, group.rank(), size, 1))
        return [o.detach(), *(x.grad for x in local)]

    for rank, results in enumerate(on_ranks(size, one_rank)):
        for name, got, full in zip(
            ("o", "dq", "dk", "dv"), results, (want.detach(), *(x.grad for x in whole)), strict=True
        ):
            expected = local_part(full, rank, size, 1)
            torch.testing.assert_close(
                got,
                expected,
                rtol=1e-9,
                atol=1e-11,
                msg=lambda m, name=name, rank=rank: f"{name} rank {rank}: {m}",
            )


@settings(max_examples=40, deadline=None)
@given(problems(), st.floats(0.05, 2.0))
def test_lightning(problem, scale):
    size, ids, draw, (groups, per_group, dk, dv) = problem
    heads = groups * per_group
    q, k, v, weight = draw(heads, dk), draw(heads, dk), draw(heads, dv), draw(heads, dv)
    decay = log_decay(heads)
    assert_ranks_equal_whole(
        size,
        lambda group, *x: context_lightning_attn(
            *x, decay, scale=scale, group=group, document_ids=ids
        ),
        lambda *x: dense_lightning(*x, decay, scale, ids),
        *(q, k, v, weight),
    )


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(["all_gather", "ring"]), st.floats(0.05, 2.0))
def test_softmax(problem, method, scale):
    size, ids, draw, (groups, per_group, d, _) = problem
    q = draw(groups * per_group, d)
    k = draw(groups, d)
    v = draw(groups, d)
    weight = draw(groups * per_group, d)
    assert_ranks_equal_whole(
        size,
        lambda group, *x: context.context_softmax_attn(
            *x, scale=scale, group=group, document_ids=ids, method=method
        ),
        lambda *x: dense_softmax(*x, scale, ids),
        *(q, k, v, weight),
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2), st.integers(1, 3))
def test_layout_round_trip(size, chunk, dim, width):
    shape = [width, width + 1, width]
    shape[dim] = 2 * size * chunk
    x = torch.arange(torch.Size(shape).numel()).view(shape)

    def one_rank(group):
        mine = context.split_sequence(x, group, dim)
        positions = context.local_positions(mine.shape[dim], group)
        assert torch.equal(mine, x.index_select(dim, positions))
        return context.gather_sequence(mine, group, dim)

    for whole in on_ranks(size, one_rank):
        assert torch.equal(whole, x)
