from unittest import mock

import pytest
import torch

from megatron_hypenet.parallel.context import blocks
from megatron_hypenet.parallel.context.blocks import Block, attend, attend_backward
from megatron_hypenet.parallel.context.documents import Documents
from tests.dense_attention import dense_softmax, document_ids

SPANS = {  # queries and keys of one block in a sequence of 12, and whether it is causal
    "whole": Block(((0, 12),), ((0, 12),), causal=True),
    "late queries": Block(((7, 12),), ((0, 12),), causal=True),
    "full": Block(((6, 12),), ((0, 5),), causal=False),
    "zigzag": Block(((0, 3), (9, 12)), ((0, 3), (9, 12)), causal=True),
}


def draw(block, h=6, g=2, d=4, dtype=torch.float64):
    lengths = [sum(stop - start for start, stop in spans) for spans in (block.queries, block.keys)]
    shapes = ((lengths[0], h), (lengths[1], g), (lengths[1], g))
    return [
        torch.randn(2, length, heads, d, dtype=torch.float64).to(dtype) for length, heads in shapes
    ]


def dense(q, k, v, block, ids):
    """Return o, log-sum-exp and visibility of a block by its definition on global positions."""
    at = [
        torch.cat([torch.arange(start, stop) for start, stop in spans])
        for spans in (block.queries, block.keys)
    ]
    mask = at[0][:, None] >= at[1][None, :]
    mask = (
        mask[None]
        if ids is None
        else mask & (ids[:, at[0]][:, :, None] == ids[:, at[1]][:, None, :])
    )
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = (0.3 * torch.einsum("bihd,bjhd->bhij", q, k)).masked_fill(~mask[:, None], -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1).nan_to_num(), v), scores.logsumexp(-1)


@pytest.mark.parametrize("tile", [2, 5, 256])
@pytest.mark.parametrize("name", SPANS)
@pytest.mark.parametrize(
    "ids", [None, document_ids((2, 8, 10), (5,), length=12)], ids=["one", "documents"]
)
def test_a_block_and_its_gradients_equal_the_definition(name, ids, tile):
    block = SPANS[name]
    documents = None if ids is None else Documents(ids)
    q, k, v = (x.requires_grad_() for x in draw(block))
    want, want_sum = dense(q, k, v, block, ids)
    upstream = torch.randn_like(want)
    want.backward(upstream)
    with mock.patch.object(blocks, "TILE_QUERIES", tile), torch.no_grad():
        o, log_sum = attend(q, k, v, block, scale=0.3, documents=documents)
        torch.testing.assert_close(o, want, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(log_sum, want_sum, rtol=1e-11, atol=1e-12)
        # of all blocks together it is finite
        seen = log_sum.clamp(min=torch.finfo(torch.float64).min)
        grads = attend_backward(upstream, q, k, v, o, seen, block, scale=0.3, documents=documents)
    for got, x in zip(grads, (q, k, v), strict=True):
        torch.testing.assert_close(got, x.grad, rtol=1e-10, atol=1e-11)


def test_large_scores_do_not_overflow():
    block = SPANS["whole"]
    q, k, v = (200 * x for x in draw(block, dtype=torch.float32))
    o, log_sum = attend(q, k, v, block, scale=1.0, documents=None)
    assert torch.isfinite(o).all() and torch.isfinite(log_sum).all()
    torch.testing.assert_close(
        o.double(), dense_softmax(q.double(), k.double(), v.double(), 1.0), rtol=1e-4, atol=1e-2
    )


def test_bf16_leaves_in_fp32():
    block = SPANS["whole"]
    q, k, v = draw(block, dtype=torch.bfloat16)
    o, log_sum = attend(q, k, v, block, scale=0.3, documents=None)
    assert o.dtype == log_sum.dtype == torch.float32
    torch.testing.assert_close(
        o.double(), dense_softmax(q.double(), k.double(), v.double(), 0.3), rtol=1e-5, atol=1e-6
    )
