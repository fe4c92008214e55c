"""The definitions that attention over split sequences answers to: dense, in the dtype of their
inputs, with documents as a mask."""

import torch


def document_ids(*starts_of_rows, length):
    """Make int32 [rows, length] from the positions, after 0, at which each row starts another
    document."""
    position = torch.arange(length)
    rows = [
        torch.bucketize(position, torch.tensor(list(starts), dtype=torch.int64), right=True)
        for starts in starts_of_rows
    ]
    return torch.stack(rows).int()


def visible(ids, length):
    """Return which key each query sees: bool [rows or 1, length, length]."""
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None]
    return mask if ids is None else mask & (ids[:, :, None] == ids[:, None, :])


def dense_lightning(q, k, v, log_decay, scale, ids=None):
    """Return o [b, t, h, v] of decayed linear attention: every pair of tokens at once."""
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])[None, :]
    decay = torch.exp(log_decay[:, None, None] * distance.clamp(min=0))
    weights = (decay[None] * visible(ids, q.shape[1])[:, None]).to(q.dtype)
    return scale * torch.einsum(
        "bihk,bjhk,bhij,bjhv->bihv", q, k, weights.expand(q.shape[0], -1, -1, -1), v
    )


def dense_softmax(q, k, v, scale, ids=None):
    """Compute o [b, t, h, d] of causal softmax attention; k and v [b, t, groups, d] are repeated
    for the heads of a group."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    p = scores.masked_fill(~visible(ids, q.shape[1])[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", p, v)
