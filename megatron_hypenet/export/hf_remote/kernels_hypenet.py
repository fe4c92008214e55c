"""Triton kernels for single tokens on a GPU; without Triton the layers use torch alone.

Attention of one new token: the keys are split among many programs, whose partial softmaxes a second
kernel joins. How many keys there are is read on the device, so that a captured step stays right
when the text grows. Shapes: b rows, g key/value heads, h heads, d head_dim, n splits."""

import math

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_MOST_CHANNELS = 256
_BLOCK_COLUMNS = 64
_PROGRAMS = 512
_MOST_SPLITS = 128
_WARPS = 4
_STAGES = 3
_LOG2_E = math.log2(math.e)

if triton is not None:

    @triton.jit
    def _attend_splits(
        q,
        k,
        v,
        at,
        real,
        partial,
        sums,
        maxima,
        scale,
        capacity,
        stride_real,
        heads,
        groups,
        channels,
        has_real: tl.constexpr,
        splits: tl.constexpr,
        per_group: tl.constexpr,
        rows: tl.constexpr,
        width: tl.constexpr,
        block: tl.constexpr,
    ):
        """Attend to one split of the keys of one group: unnormalised outputs [b, h, n, d], sums and
        maxima [b, h, n] of exp2(logits), all in fp32."""
        batch = (tl.program_id(0) // groups).to(tl.int64)
        group = tl.program_id(0) % groups
        split = tl.program_id(1)
        length = tl.load(at).to(tl.int32) + 1
        share = tl.cdiv(tl.cdiv(length, splits), block) * block
        start = split * share
        stop = tl.minimum(start + share, length)
        row = tl.arange(0, rows)
        channel = tl.arange(0, width)
        head = batch * heads + group * per_group + row
        is_head = row < per_group
        is_channel = channel < channels
        query = tl.load(
            q + head[:, None] * channels + channel[None, :],
            mask=is_head[:, None] & is_channel[None, :],
            other=0.0,
        )
        base = (batch * groups + group) * capacity * channels
        best = tl.full([rows], float("-inf"), tl.float32)
        total = tl.zeros([rows], tl.float32)
        out = tl.zeros([rows, width], tl.float32)
        for first in range(start, stop, block):
            column = first + tl.arange(0, block)
            inside = column < stop
            there = base + column.to(tl.int64)[:, None] * channels + channel[None, :]
            wanted = inside[:, None] & is_channel[None, :]
            key = tl.load(k + there, mask=wanted, other=0.0)
            logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
            if has_real:
                # a padded row sees its newest column: without any key it would be NaN
                seen = tl.load(real + batch * stride_real + column, mask=inside, other=0)
                inside = inside & ((seen != 0) | (column == length - 1))
            logits = tl.where(inside[None, :], logits, float("-inf"))
            higher = tl.maximum(best, tl.max(logits, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.exp2(logits - shift[:, None])
            shrink = tl.exp2(best - shift)
            total = total * shrink + tl.sum(weight, 1)
            value = tl.load(v + there, mask=wanted, other=0.0)
            out = out * shrink[:, None] + tl.dot(
                weight.to(value.dtype), value, input_precision="ieee"
            )
            best = higher
        place = head * splits + split
        tl.store(maxima + place, best, mask=is_head)
        tl.store(sums + place, total, mask=is_head)
        tl.store(partial + place[:, None] * width + channel[None, :], out, mask=is_head[:, None])

    @triton.jit
    def _join_splits(partial, sums, maxima, o, channels, splits: tl.constexpr, width: tl.constexpr):
        """Compute the output of one head from its splits."""
        head = tl.program_id(0).to(tl.int64)
        split = tl.arange(0, splits)
        channel = tl.arange(0, width)
        best = tl.load(maxima + head * splits + split)
        weight = tl.exp2(best - tl.max(best, 0))
        total = tl.sum(tl.load(sums + head * splits + split) * weight, 0)
        there = (head * splits + split[:, None]) * width + channel[None, :]
        out = tl.sum(tl.load(partial + there) * weight[:, None], 0) / total
        tl.store(o + head * channels + channel, out.to(o.dtype.element_ty), channel < channels)


def can_attend(q: Tensor) -> bool:
    """Return whether the kernels take queries like q [b, h, 1, d]."""
    return (
        triton is not None
        and q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and q.shape[-1] <= _MOST_CHANNELS
    )


def attend_in_place(q: Tensor, k: Tensor, v: Tensor, at: Tensor, real: Tensor | None) -> Tensor:
    """Compute softmax attention of one query per row, q [b, h, 1, d], over the first at + 1 columns
    of the contiguous buffers k, v [b, g, capacity, d] -> [b, h, 1, d].

    `at` [1] is the newest column, `real` [b, capacity or more] says which others are no padding."""
    b, h, _, d = q.shape
    groups, capacity = k.shape[1:3]
    q = q.contiguous()
    splits = min(_MOST_SPLITS, triton.next_power_of_2(max(_PROGRAMS // (b * groups), 1)))
    width = max(16, triton.next_power_of_2(d))
    partial = torch.empty(b, h, splits, width, dtype=torch.float32, device=q.device)
    sums, maxima = torch.empty(2, b, h, splits, dtype=torch.float32, device=q.device)
    _attend_splits[(b * groups, splits)](
        q,
        k,
        v,
        at,
        q if real is None else real.view(torch.uint8),
        partial,
        sums,
        maxima,
        _LOG2_E / math.sqrt(d),
        capacity,
        0 if real is None else real.stride(0),
        h,
        groups,
        d,
        has_real=real is not None,
        splits=splits,
        per_group=h // groups,
        rows=max(16, triton.next_power_of_2(h // groups)),
        width=width,
        block=_BLOCK_COLUMNS if q.itemsize == 2 else _BLOCK_COLUMNS // 2,
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
    o = torch.empty_like(q)
    _join_splits[(b * h,)](partial, sums, maxima, o, d, splits=splits, width=width, num_warps=4)
    return o
