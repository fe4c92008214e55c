import math

import pytest
import torch

from megatron_hypenet.export.hf_remote import mixer_attn as remote
from megatron_hypenet.export.hf_remote.ops_hypenet import Step
from megatron_hypenet.ops import logits_scale

from .conftest import close, random


@pytest.mark.parametrize("setting", [None, "hype", "hype 500", 1.5])
def test_query_scale_is_the_training_code_s(setting):
    positions = torch.arange(0, 100_000, 7919)
    got = remote.query_scale(setting, positions[None], torch.float64)
    want = logits_scale.logits_scale(setting, positions, torch.float64)
    if want is None:
        assert got is None
    else:
        close(got.expand(1, 1, len(positions), 1)[0, 0, :, 0], want)


@pytest.mark.parametrize("setting", ["hype 1", "log"])
def test_query_scale_refuses(setting):
    with pytest.raises(ValueError, match="attn_logits_scaling"):
        remote.query_scale(setting, torch.arange(3)[None], torch.float64)


def step(*, past=0, real=None):
    empty = torch.zeros(1)
    return Step(empty, empty, {}, None if real is None else real[:, past:], real, past)


def dense(q, k, v, past, real=None):
    """Attention by its definition."""
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
