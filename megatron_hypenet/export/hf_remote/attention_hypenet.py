"""Causal softmax attention by fused kernels: prompts, further turns and single tokens, with and
without padding.

Memory stays linear in the number of tokens: a mask is made for a block of queries at a time, and
only where there is padding or no kernel knows causal blocks. Shapes: b rows, t new tokens, h heads,
g key/value heads, d head_dim."""

import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from .kernels_hypenet import attend_in_place, can_attend
from .ops_hypenet import Step, is_open

_QUERY_BLOCK_TOKENS = 1024
_CUDNN_TOKENS = 4096
"""cuDNN is twice as fast as flash attention, and plans for a tenth of a second when it meets a new
shape: it is used for numbers of new tokens that recur, multiples of this."""
_MOST_CHANNELS = 256


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, step: Step, *, plain: bool = False
) -> Tensor:
    """Compute causal attention of q [b, h, t, d] over k, v [b, g, past + t, d] -> [b, h, t, d];
    padded keys are left out.

    `plain`: by products and a softmax, not by a fused kernel. In a step in place k and v are whole
    buffers."""
    if plain:
        with sdpa_kernel(SDPBackend.MATH):
            return softmax_attention(q, k, v, step)
    if step.at is not None:
        if can_attend(q):
            return attend_in_place(q, k, v, step.at, step.real)
        columns = torch.arange(k.shape[2], device=q.device)[None]
        real = columns <= step.at
        if step.real is not None:
            capacity = k.shape[2]
            known = step.real[:, :capacity]
            known = F.pad(known, (0, capacity - known.shape[1]))
            real = real & (known | (columns == step.at))
        return _one_query(q, k, v, real)
    if q.shape[2] == 1:
        return _one_query(q, k, v, None if step.real is None else step.real | _is_last(step.real))
    if step.real is not None or torch.compiler.is_compiling():
        return _in_blocks(q, *_per_head(q, k, v), step)
    return _unpadded(q, k, v, step)


def _one_query(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    """Attend with one query per row over the columns that are `real` [b or 1, columns] (None:
    all)."""
    b, h, _, d = q.shape
    groups = k.shape[1]
    # the query heads of one group become its queries: no copy of k and v for grouped heads
    grouped = q.reshape(b, groups, h // groups, d)
    mask = None if real is None else real[:, None, None, :]
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(b, h, 1, d)


def _is_last(real: Tensor) -> Tensor:
    last = torch.zeros_like(real[:1])
    last[:, -1] = True
    return last


def _per_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat k and v for every head."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return k, v


def _unpadded(q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
    """Attend without padding: causal kernels, which need no mask in memory."""
    t = q.shape[2]
    fused = (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] <= _MOST_CHANNELS
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )
    if not fused or (torch.is_grad_enabled() and step.past > 0):
        return _in_blocks(q, *_per_head(q, k, v), step)
    if t % _CUDNN_TOKENS == 0 and not torch.is_grad_enabled() and _can_use_cudnn(q, k, v):
        return _by_cudnn(q, k, v, step.past)
    if step.past == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    # flash attention knows causal blocks that end together
    bias = causal_lower_right(t, k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)


def _can_use_cudnn(q: Tensor, k: Tensor, v: Tensor) -> bool:
    known = getattr(cuda, "can_use_cudnn_attention", None)
    return known is not None and known(cuda.SDPAParams(q, k, v, None, 0.0, True, True))


def _by_cudnn(q: Tensor, k: Tensor, v: Tensor, past: int) -> Tensor:
    """Attend by cuDNN, whose causal blocks start together: earlier keys and new ones are attended
    to one after the other and joined by their log-sum-exps."""
    own, own_sums = _cudnn(q, k[:, :, past:], v[:, :, past:], causal=True)
    if past == 0:
        return own
    before, before_sums = _cudnn(q, k[:, :, :past], v[:, :, :past], causal=False)
    share = torch.sigmoid(before_sums - own_sums)[..., None]
    return torch.lerp(own.float(), before.float(), share).to(q.dtype)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Return the output and its log-sum-exps [b, h, t]. cuDNN plans anew for every shape and
    stride: those of contiguous keys do not depend on the size of a buffer."""
    o, log_sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k.contiguous(), v.contiguous(), None, True, 0.0, causal, False
    )
    return o, log_sums.reshape(o.shape[:-1])


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
    """Attend with a mask, for one block of queries at a time; k, v [b, h, past + t, d]."""
    t = q.shape[2]
    if step.real is None and step.past == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    columns = torch.arange(step.past + t, device=q.device)
    blocks = [(0, t)]
    if not is_open(t):
        starts = range(0, t, _QUERY_BLOCK_TOKENS)
        blocks = [(start, min(start + _QUERY_BLOCK_TOKENS, t)) for start in starts]
    outputs = []
    for start, stop in blocks:
        own = columns[step.past + start : step.past + stop, None]
        mask = (columns <= own)[None]
        if step.real is not None:
            # a padded query sees itself: a row without any key would be NaN
            mask = mask & (step.real[:, None, :] | (columns == own))
        outputs.append(
            F.scaled_dot_product_attention(q[:, :, start:stop], k, v, attn_mask=mask[:, None])
        )
    return torch.cat(outputs, dim=2)
