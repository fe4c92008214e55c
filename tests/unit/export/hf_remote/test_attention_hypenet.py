import math

import pytest
import torch

from megatron_hypenet.export.hf_remote import attention_hypenet as remote
from megatron_hypenet.export.hf_remote.ops_hypenet import Step

from .conftest import close, random


def step(*, past=0, real=None):
    empty = torch.zeros(1)
    return Step(empty, empty, {}, None if real is None else real[:, past:], real, past)


def dense(q, k, v, past, real=None):
    """Compute attention by its definition."""
    b, h, t, d = q.shape
    k, v = (x.repeat_interleave(h // x.shape[1], 1) for x in (k, v))
    allowed = torch.ones(t, past + t, dtype=torch.bool).tril(past).expand(b, 1, t, past + t)
    if real is not None:
        allowed = allowed & real[:, None, None, :]
    return ((q @ k.transpose(-1, -2)) / math.sqrt(d)).masked_fill(~allowed, -torch.inf).softmax(
        -1
    ).nan_to_num() @ v


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("t", [1, 7, 33])
@pytest.mark.parametrize("padded", [False, True])
def test_softmax_attention(monkeypatch, past, t, padded):
    monkeypatch.setattr(remote, "_QUERY_BLOCK_TOKENS", 8)
    q = random(2, 6, t, 4)
    k = random(2, 2, past + t, 4, seed=1)
    v = random(2, 2, past + t, 4, seed=2)
    real = None
    if padded:
        real = torch.rand(2, past + t, generator=torch.Generator().manual_seed(4)) > 0.3
    got = remote.softmax_attention(q, k, v, step(past=past, real=real))
    want = dense(q, k, v, past, real)
    assert torch.isfinite(got).all()
    keep = torch.ones(2, t, dtype=torch.bool) if real is None else real[:, past:]
    close(got.transpose(1, 2)[keep], want.transpose(1, 2)[keep])


@pytest.mark.parametrize("padded", [False, True])
def test_a_step_in_place_reads_the_number_of_columns_from_the_device(padded):
    q = random(2, 6, 1, 4)
    k = random(2, 2, 16, 4, seed=1)
    v = random(2, 2, 16, 4, seed=2)
    real = None
    if padded:
        real = torch.rand(2, 20, generator=torch.Generator().manual_seed(4)) > 0.3
        real[:, 8] = True
    for buffer in (k, v):
        buffer[:, :, 9:] = 70.0
    got = remote.softmax_attention(q, k, v, step(real=real)._replace(at=torch.tensor([8])))
    seen = None if real is None else real[:, :9]
    close(got, dense(q, k[:, :, :9], v[:, :, :9], 8, seen))


def test_blocks_of_cudnn_are_joined_by_their_log_sums(monkeypatch):
    def kernel(q, k, v, bias, wants_sums, dropout, causal, mask):
        logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if causal:
            logits = logits.masked_fill(
                ~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -torch.inf
            )
        return logits.softmax(-1) @ v, logits.logsumexp(-1, keepdim=True)

    monkeypatch.setattr(
        torch.ops.aten, "_scaled_dot_product_cudnn_attention", kernel, raising=False
    )
    q = random(2, 3, 7, 4).float()
    k = random(2, 3, 12, 4, seed=1).float()
    v = random(2, 3, 12, 4, seed=2).float()
    for past in (0, 5):
        columns = slice(None, past + 7)
        got = remote._by_cudnn(q, k[:, :, columns], v[:, :, columns], past)
        torch.testing.assert_close(got, dense(q, k[:, :, columns], v[:, :, columns], past))
