from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_hypenet.model.mixers import lightning_attn as lightning
from megatron_hypenet.ops.decay import log_decay
from megatron_hypenet.parallel.context import state_exchange
from megatron_hypenet.parallel.context.layout import local_part
from tests.dense_attention import dense_lightning, document_ids
from tests.threaded_ranks import on_ranks

DECAY = log_decay(2)


def tensors(length, dtype=torch.float64, b=2):
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randn(b, length, 2, d, generator=generator, dtype=torch.float64).to(dtype)
        for d in (3, 3, 4)
    ]


def run(group, q, k, v, ids=None):
    local = [local_part(x, group.rank(), group.size(), 1) for x in (q, k, v)]
    return lightning.context_lightning_attn(*local, DECAY, scale=0.5, group=group, document_ids=ids)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("ids", [None, document_ids((5, 6), (12,), length=24)])
def test_ranks_hold_their_part_of_the_whole(size, ids):
    q, k, v = tensors(24)
    want = dense_lightning(q, k, v, DECAY, 0.5, ids)
    for rank, o in enumerate(on_ranks(size, lambda group: run(group, q, k, v, ids))):
        torch.testing.assert_close(o, local_part(want, rank, size, 1), rtol=1e-11, atol=1e-12)


@contextmanager
def recorded(events):
    """Provide the order in which the exchange and the local scan happen, forward and backward."""
    gather = dist.all_gather_into_tensor
    scan = lightning.lightning_attn
    receive = state_exchange.StateTransfer._receive

    def recording(name, function):
        def call(*args, **kwargs):
            events.append(name)
            return function(*args, **kwargs)

        return call

    def scan_and_mark(*args, **kwargs):
        events.append("scan")
        o, state = scan(*args, **kwargs)
        o.register_hook(lambda grad: events.append("scan backward"))
        return o, state

    with (
        mock.patch.object(dist, "all_gather_into_tensor", recording("send", gather)),
        mock.patch.object(lightning, "lightning_attn", scan_and_mark),
        mock.patch.object(state_exchange.StateTransfer, "_receive", recording("receive", receive)),
    ):
        yield


def test_states_travel_while_the_local_scan_works_in_both_directions():
    inputs = tensors(8)

    def one_rank(group):
        events = []
        if group.rank() == 0:
            with recorded(events):
                group.shared.barrier.wait()
                run(group, *(x.clone().requires_grad_() for x in inputs)).sum().backward()
                group.shared.barrier.wait()
        else:
            group.shared.barrier.wait()
            run(group, *(x.clone().requires_grad_() for x in inputs)).sum().backward()
            group.shared.barrier.wait()
        return events

    # both ranks go through the patched functions, so each event is there twice
    events = on_ranks(2, one_rank)[0]
    order = list(
        dict.fromkeys(
            zip(events, [events[:i].count(e) // 2 for i, e in enumerate(events)], strict=True)
        )
    )
    forward = order[:3]
    backward = order[3:]
    assert [name for name, _ in forward] == ["send", "scan", "receive"]
    assert [name for name, _ in backward] == ["send", "scan backward", "receive"]


def test_frozen_keys_exchange_nothing_in_backward():
    q, k, v = tensors(8)

    def one_rank(group):
        query = local_part(q, group.rank(), 2, 1).clone().requires_grad_()
        key, value = (local_part(x, group.rank(), 2, 1) for x in (k, v))
        lightning.context_lightning_attn(
            query, key, value, DECAY, scale=0.5, group=group
        ).sum().backward()
        return query.grad

    whole = q.clone().requires_grad_()
    dense_lightning(whole, k, v, DECAY, 0.5).sum().backward()
    for rank, grad in enumerate(on_ranks(2, one_rank)):
        torch.testing.assert_close(grad, local_part(whole.grad, rank, 2, 1))


def test_wrong_lengths_and_documents_are_refused():
    q, k, v = tensors(9)
    with pytest.raises(ValueError, match="9 local tokens"):
        on_ranks(
            2,
            lambda group: lightning.context_lightning_attn(q, k, v, DECAY, scale=1.0, group=group),
        )
    ids = torch.zeros(2, 9, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"document_ids has shape \(2, 9\), expected \(2, 18\)"):
        on_ranks(
            2,
            lambda group: lightning.context_lightning_attn(
                q, k, v, DECAY, scale=1.0, group=group, document_ids=ids
            ),
        )


@pytest.mark.parametrize("size", [1, 2, 3])
def test_chunks_get_the_tokens_before_them(size):
    """And the gradient of such a token goes back to the rank that holds it."""
    x = torch.arange(24.0).view(1, 24, 1) + 1
    ids = document_ids((5, 13), length=24)

    def one_rank(group):
        mine = local_part(x, group.rank(), size, 1).clone().requires_grad_()
        rows = state_exchange.preceding_tokens(mine, 2, group)
        rows[:, :2].sum().backward()
        return rows.detach()[..., 0], state_exchange.preceding_ids(ids, 2, group), mine.grad[..., 0]

    padded = torch.nn.functional.pad(x[..., 0], (2, 0))
    c, wanted = (
        (24, [(0,)])
        if size == 1
        else (12 // size, [(rank, 2 * size - 1 - rank) for rank in range(size)])
    )
    for rank, (rows, row_ids, grad) in enumerate(on_ranks(size, one_rank)):
        want = torch.cat([padded[:, chunk * c : (chunk + 1) * c + 2] for chunk in wanted[rank]])
        assert torch.equal(rows, want)
        assert torch.equal(
            row_ids, torch.where(want == 0, -1, ids[0][(want - 1).long().clamp(min=0)])
        )
        ends = [0.0] * (c - 2) + [1.0, 1.0]
        assert grad[0].tolist() == [
            value * (size > 1 and chunk < 2 * size - 1) for chunk in wanted[rank] for value in ends
        ]


def test_chunks_shorter_than_what_is_read_before_them_are_refused():
    with pytest.raises(ValueError, match="chunks of 2 tokens are shorter than the 3 tokens"):
        on_ranks(2, lambda group: state_exchange.preceding_tokens(torch.zeros(1, 4, 1), 3, group))
