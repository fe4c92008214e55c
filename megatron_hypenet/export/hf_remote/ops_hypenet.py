"""HypeNet's mathematics as functions: decay slopes, RoPE, logit scaling, Lightning attention,
softmax attention.

Shapes: b rows, t new tokens, h heads, g key/value heads, d head_dim."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

_LIGHTNING_CHUNK_TOKENS = 128
_LIGHTNING_GROUP_TOKENS = 4096
_QUERY_BLOCK_TOKENS = 1024
_HYPE_DEFAULT = 362.0


class Step(NamedTuple):
    """What the layers need to know about the new tokens of one call."""

    cos: Tensor  # [b or 1, 1, t, d]
    sin: Tensor
    query_scale: Tensor | None  # [b or 1, 1, t, 1], the softmax layers' logit scaling
    slopes: Tensor  # [h], decay of the Lightning layers per real token: exp(-slope)
    new_real: Tensor | None  # [b, t] bool; None: no padding
    real: Tensor | None  # [b, past + t] bool; None: no padding
    past: int  # columns already in the cache


def alibi_slopes(num_heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[h] slopes: 2^(-8(i+1)/n) for the power of two n <= h, then every second slope of the set for
    2n until h are there."""
    n = 1 << (num_heads.bit_length() - 1)
    exponents = torch.arange(1, n + 1, device=device, dtype=dtype) / n
    more = (1 + 2 * torch.arange(num_heads - n, device=device, dtype=dtype)) / (2 * n)
    return torch.exp2(-8.0 * torch.cat([exponents, more]))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for an fp64 model, fp32 for all others: the dtype of states, positions and the loss."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """Mean cross entropy of logits [b, t, vocab_size] against the next of labels [b, t], or against
    shift_labels [b, t] as they are.

    Labels equal to `ignore_index` are left out; `num_items_in_batch` replaces the count in the
    mean. ValueError for other shapes."""
    given = labels if shift_labels is None else shift_labels
    if given is None or given.shape != logits.shape[:-1]:
        shape = None if given is None else list(given.shape)
        raise ValueError(
            f"labels must be {list(logits.shape[:-1])}, one per row of logits (leave "
            f"logits_to_keep out), got {shape}"
        )
    if shift_labels is None:
        logits = logits[:, :-1]
        given = given[:, 1:]
    given = given.to(logits.device)
    flat = logits.flatten(0, 1).to(accumulation_dtype(logits.dtype))
    total = F.cross_entropy(flat, given.flatten(), ignore_index=ignore_index, reduction="sum")
    if num_items_in_batch is None:
        return total / (given != ignore_index).sum()
    return total / (
        num_items_in_batch.to(total.device)
        if torch.is_tensor(num_items_in_batch)
        else num_items_in_batch
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x [b, h, t, d] (rotate-half convention), computed in the tables' dtype."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def rope_tables(
    head_dim: int, theta: float, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos, sin [b or 1, 1, t, d] of positions [b or 1, t]. Angles are computed in fp64 so that
    positions near 10^6 stay exact."""
    angle_dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    channels = torch.arange(0, head_dim, 2, device=positions.device, dtype=angle_dtype)
    angles = positions[:, None, :, None].to(angle_dtype) * theta ** (-channels / head_dim)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def query_scale(
    setting: str | float | None, positions: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """Factor of q in softmax layers at 0-based `positions` [b or 1, t]: ln(t + a) / ln(a) for "hype
    <a>", a constant, or None."""
    a = hype_constant(setting)
    if a is not None:
        return (torch.log(positions.to(dtype) + a) / math.log(a))[:, None, :, None]
    return (
        None
        if setting is None
        else torch.full((1, 1, 1, 1), float(setting), dtype=dtype, device=positions.device)
    )


def hype_constant(setting: str | float | None) -> float | None:
    """The a of "hype <a>", None for a number or None; ValueError for another setting."""
    if setting is None or (isinstance(setting, int | float) and not isinstance(setting, bool)):
        return None
    try:
        name, _, number = str(setting).strip().partition(" ")
        a = float(number or _HYPE_DEFAULT)
    except ValueError:
        a = math.nan
    if name != "hype" or not 1 < a < math.inf:
        raise ValueError(
            f"attn_logits_scaling must be 'hype <a>' with a > 1, a number or null, got {setting!r}"
        )
    return a


def lightning_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, slopes: Tensor, new_real: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token: q, k, v [b, h, 1, d], state [b, h, d, d] -> o [b, h, 1, d], new state. A padded
    row keeps its state."""
    decay = torch.exp(-slopes)[:, None, None]
    new = decay * state + k.transpose(-1, -2) @ v
    if new_real is not None:
        new = torch.where(new_real[:, None, :, None], new, state)
    return q @ new, new


def lightning_chunks(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, slopes: Tensor, new_real: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Any number of tokens: q, k, v [b, h, t, d], state [b, h, d, d] -> o [b, h, t, d] in the
    state's dtype, new state.

    Decay counts real tokens, so padding leaves a state as it was. Groups of chunks bound the memory
    to a few copies of q."""
    outputs = []
    group = _group_tokens(q)
    for start in range(0, q.shape[2], group):
        part = slice(start, start + group)
        qg, kg, vg = (x[:, :, part].to(state.dtype) for x in (q, k, v))
        if new_real is None:
            count = torch.arange(1, qg.shape[2] + 1, device=q.device, dtype=state.dtype)[None]
        else:
            real = new_real[:, part].to(state.dtype)
            count = real.cumsum(1)
            kg = kg * real[:, None, :, None]
        o, state = _lightning_group(qg, kg, vg, state, -slopes[:, None] * count[:, None, :])
        outputs.append(o)
    return torch.cat(outputs, dim=2), state


def _group_tokens(q: Tensor) -> int:
    """Tokens to work on at once: many chunks fill a GPU and need few launches, one chunk stays in a
    CPU's cache (twice as fast)."""
    return (
        _LIGHTNING_CHUNK_TOKENS
        if q.device.type == "cpu"
        else max(_LIGHTNING_CHUNK_TOKENS, _LIGHTNING_GROUP_TOKENS // q.shape[0])
    )


def _lightning_group(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor
) -> tuple[Tensor, Tensor]:
    """All chunks of a group at once. `log_decay` [b or 1, h, t]: from before the group to each
    token, never growing.

    A token sees its own chunk by (q k^T * decay) v, and all before by q times the state at the
    start of its chunk. Every exponent is <= 0, so strong decay ends in 0 and never overflows."""
    t = q.shape[2]
    chunk = min(_LIGHTNING_CHUNK_TOKENS, t)
    if fill := -t % chunk:
        q, k, v = (F.pad(x, (0, 0, 0, fill)) for x in (q, k, v))
        log_decay = torch.cat(
            [log_decay, log_decay[..., -1:].expand(*log_decay.shape[:-1], fill)], dim=-1
        )
    q, k, v = (x.unflatten(2, (-1, chunk)) for x in (q, k, v))  # [b, h, n, chunk, d]
    log_decay = log_decay.unflatten(2, (-1, chunk))
    end = log_decay[..., -1]  # [b or 1, h, n]
    begin = F.pad(end[..., :-1], (1, 0))
    o = (q @ k.transpose(-1, -2) * _decay(log_decay, log_decay, 0)) @ v
    # [b, h, n, d, d]
    added = (k * (end[..., None] - log_decay).exp()[..., None]).transpose(-1, -2) @ v
    starts = begin.exp()[..., None, None] * state[:, :, None]
    starts = starts + (_decay(begin, end, -1) @ added.flatten(3)).view_as(added)
    o = o + (q * (log_decay - begin[..., None]).exp()[..., None]) @ starts
    state = (end - begin)[..., -1].exp()[..., None, None] * starts[:, :, -1] + added[:, :, -1]
    return o.flatten(2, 3)[:, :, :t], state


def _decay(to: Tensor, since: Tensor, diagonal: int) -> Tensor:
    """exp(to_i - since_j) [..., i, j] on and below the given diagonal, 0 above it."""
    between = to[..., :, None] - since[..., None, :]
    below = torch.ones(between.shape[-2:], dtype=torch.bool, device=to.device).tril(diagonal)
    return between.masked_fill(~below, -torch.inf).exp()


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, step: Step, *, plain: bool = False
) -> Tensor:
    """Causal attention of q [b, h, t, d] over k, v [b, g, past + t, d] -> [b, h, t, d]; padded keys
    are left out.

    `plain`: by products and a softmax, not by a fused kernel."""
    if plain:
        with sdpa_kernel(SDPBackend.MATH):
            return softmax_attention(q, k, v, step)
    b, h, t, d = q.shape
    groups = k.shape[1]
    if t == 1:
        # the query heads of one group become its queries: no copy of k and v for grouped heads
        mask = None if step.real is None else (step.real | _is_last(step.real))[:, None, None, :]
        o = F.scaled_dot_product_attention(
            q.reshape(b, groups, h // groups, d), k, v, attn_mask=mask
        )
        return o.reshape(b, h, 1, d)
    k, v = (x.repeat_interleave(h // groups, dim=1) for x in (k, v))
    if step.real is None and step.past == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    columns = torch.arange(step.past + t, device=q.device)
    outputs = []
    for start in range(0, t, _QUERY_BLOCK_TOKENS):
        stop = min(start + _QUERY_BLOCK_TOKENS, t)
        own = columns[step.past + start : step.past + stop, None]
        mask = (columns <= own)[None]
        if step.real is not None:
            # a padded query sees itself: a row without any key would be NaN
            mask = mask & (step.real[:, None, :] | (columns == own))
        outputs.append(
            F.scaled_dot_product_attention(q[:, :, start:stop], k, v, attn_mask=mask[:, None])
        )
    return torch.cat(outputs, dim=2)


def _is_last(real: Tensor) -> Tensor:
    last = torch.zeros_like(real[:1])
    last[:, -1] = True
    return last
