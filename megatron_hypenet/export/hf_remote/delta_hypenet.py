"""The gated delta rule of a HypeNet's Gated DeltaNet and Kimi Delta Attention layers.

S'_t = Diag(exp g_t) S_(t-1), S_t = S'_t + beta_t k_t (v_t - k_t^T S'_t)^T, o_t = q_t^T S_t. Shapes:
b rows, t new tokens, h heads, d head_dim, c 1 (one decay per head) or d (one per key channel), n
chunks, H hidden_size."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .layers_hypenet import HypeNetMixer
from .ops_hypenet import (
    Step,
    accumulation_dtype,
    is_open,
    rotate,
    token_by_token,
    without_autocast,
)
from .slots_hypenet import StateSlot

_CHUNK_TOKENS = 64
_BLOCK_TOKENS = 8
_GROUP_TOKENS = 4096
_L2_EPS = 1e-6

INITIAL_DT_BIAS = -4.6
"""Where new models start: with `A_log` 0, a decay of about 1% per token."""


class HypeNetDeltaMixer(HypeNetMixer):
    """Base of both mixers: q and k of length 1 per head, the recurrence, and its treatment of
    padding. A subclass computes decays, strengths and gates."""

    use_rope: bool
    kept_in_fp32 = ("A_log", "dt_bias")

    def forward(self, x: Tensor, step: Step, slot: StateSlot | None) -> Tensor:
        """x [b, t, H] -> [b, t, H]."""
        q, k, v = self.split(*self.inputs(x, step, slot))
        if self.use_rope:
            q, k = rotate(q, step.cos, step.sin), rotate(k, step.cos, step.sin)
        dtype = accumulation_dtype(x.dtype)
        q = unit_length(q.to(dtype))
        k = unit_length(k.to(dtype))
        b, h, t, d = q.shape
        k, v = (y.to(dtype).repeat_interleave(h // y.shape[1], dim=1) for y in (k, v))
        log_decay = self.log_decay(x, dtype)
        beta = self.strength(x, dtype)
        if step.new_real is not None:
            padded = ~step.new_real[:, None]
            log_decay = log_decay.masked_fill(padded[..., None], 0.0)
            beta = beta.masked_fill(padded, 0.0)
        state = None if slot is None else slot.state
        if state is None:
            state = q.new_zeros(b, h, d, d)
        rule = delta_step if t == 1 else delta_chunks
        o, state = rule(q, k, v, log_decay, beta, state)
        if slot is not None:
            slot.update(state, new_tokens=t)
        return self.o_proj(self.output((o / math.sqrt(d)).to(x.dtype).transpose(1, 2), x))

    def inputs(self, x: Tensor, step: Step, slot: StateSlot | None) -> tuple[Tensor, ...]:
        """x [b, t, H] -> q, k, v before their heads are split, [b, t, heads * d]."""
        raise NotImplementedError

    def log_decay(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [b, t, H] -> g [b, h, t, c], never above 0."""
        raise NotImplementedError

    def strength(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [b, t, H] -> beta [b, h, t]."""
        raise NotImplementedError

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        """o [b, t, h, d], normalised per head and gated by x, -> [b, t, h * d]."""
        raise NotImplementedError


def unit_length(x: Tensor) -> Tensor:
    """Return x [..., d] divided by its length over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _L2_EPS)


@without_autocast
def delta_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Process one token: q, k, v [b, h, 1, d], log_decay [b, h, 1, c], beta [b, h, 1], state [b, h,
    d, d] -> o [b, h, 1, d], new state.
    -> o [b, h, 1, d], new state. No decay and a beta of 0 leave the state as it is."""
    return _delta_update(state, q, k, v, log_decay, beta[..., None])


def _delta_update(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `delta_step` with beta [b, h, 1, 1]; returns the state first."""
    state = log_decay.exp().transpose(-1, -2) * state
    state = state + k.transpose(-1, -2) @ (beta * (v - k @ state))
    return q @ state, state


@without_autocast
def delta_chunks(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Process any number of tokens: q, k, v [b, h, t, d], log_decay [b, h, t, c], beta [b, h, t],
    state [b, h, d, d] -> o [b, h, t, d], new state; all in the state's dtype.

    Groups of chunks bound the memory to a few copies of q."""
    if is_open(q.shape[2]):
        return token_by_token(_delta_update, state, q, k, v, log_decay, beta[..., None])
    outputs = []
    group = _group_tokens(log_decay)
    for start in range(0, q.shape[2], group):
        part = slice(start, start + group)
        qg, kg, vg = (x[:, :, part] for x in (q, k, v))
        o, state = _delta_group(qg, kg, vg, log_decay[:, :, part], beta[:, :, part], state)
        outputs.append(o)
    return torch.cat(outputs, dim=2), state


def _group_tokens(log_decay: Tensor) -> int:
    """Return the number of tokens to work on at once: many chunks fill a GPU, one chunk stays in a
    CPU's cache. Decays per channel need 8 copies of q for the decay between tokens of a block."""
    if log_decay.device.type == "cpu":
        return _CHUNK_TOKENS
    most = _GROUP_TOKENS if log_decay.shape[-1] == 1 else _GROUP_TOKENS // 4
    return max(_CHUNK_TOKENS, most // log_decay.shape[0] // _CHUNK_TOKENS * _CHUNK_TOKENS)


def _delta_group(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Process the chunks of a group: what does not depend on the state at once, then one after the
    other.

    With G the summed log decays of a chunk up to a token and S the state before it, token i adds
    k_i u_i^T: u_i = beta_i (v_i - (k_i exp G_i)^T S - sum_(j<i) (k_i exp(G_i - G_j) k_j) u_j).
    That is a unit lower triangular system, solved for the parts with and without S (UT transform).
    Every exponent is <= 0, so strong decay ends in 0 and never overflows."""
    t = q.shape[2]
    chunk = min(_CHUNK_TOKENS, t + -t % _BLOCK_TOKENS)
    if fill := -t % chunk:
        q, k, v, log_decay = (F.pad(x, (0, 0, 0, fill)) for x in (q, k, v, log_decay))
        beta = F.pad(beta, (0, fill))
    q, k, v, log_decay, beta = (x.unflatten(2, (-1, chunk)) for x in (q, k, v, log_decay, beta))
    from_start = log_decay.cumsum(3).exp()  # [b, h, n, chunk, c]
    seen_by_k, seen_by_q = _decayed_products(k, q, log_decay)  # [b, h, n, chunk, chunk]
    sides = beta[..., None] * torch.cat([v, k * from_start], dim=-1)
    solved = torch.linalg.solve_triangular(
        beta[..., None] * seen_by_k, sides, upper=False, unitriangular=True
    )
    own, of_state = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    to_end = (k * _sums_after(log_decay).exp()).transpose(-1, -2)  # [b, h, n, d, chunk]
    kept = from_start[..., -1:, :].transpose(-1, -2)  # [b, h, n, c, 1]
    starts = []
    added = []
    for i in range(q.shape[2]):
        starts.append(state)
        added.append(own[:, :, i] - of_state[:, :, i] @ state)
        state = kept[:, :, i] * state + to_end[:, :, i] @ added[i]
    o = (q * from_start) @ torch.stack(starts, dim=2)
    o = o + seen_by_q @ torch.stack(added, dim=2)
    return o.flatten(2, 3)[:, :, :t], state


def _decayed_products(k: Tensor, q: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum_d x_i k_j exp(decay from j to i) [..., i, j] for j <= i and 0 for j > i, with x =
    k and with x = q; k, q [..., chunk, d], log_decay [..., chunk, c]."""
    if log_decay.shape[-1] == 1:
        decay = _decay_between(log_decay.squeeze(-1))
        return (k @ k.transpose(-1, -2)) * decay, (q @ k.transpose(-1, -2)) * decay
    return _products_by_channel(k, q, log_decay)


def _products_by_channel(k: Tensor, q: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `_decayed_products` with a decay per channel, which goes into the sum: from earlier
    tokens it splits at the start of a block of 8 into two factors that are at most 1, within the
    block it is taken pair by pair."""
    both = torch.stack([k, q], dim=-2)  # [..., chunk, 2, d]
    blocks = both.unflatten(-3, (-1, _BLOCK_TOKENS))  # [..., blocks, 8, 2, d]
    kb, gb = (x.unflatten(-2, (-1, _BLOCK_TOKENS)) for x in (k, log_decay))
    within = blocks @ (kb[..., None, :, :] * _decay_between_channels(gb)).transpose(-1, -2)
    in_block = F.pad(gb[..., 1:, :], (0, 0, 1, 0)).cumsum(-2).exp()
    entering = (blocks * in_block[..., None, :]).flatten(-3, -2)  # [..., blocks, 8 * 2, d]
    rows = []
    for index in range(gb.shape[-3]):
        start = index * _BLOCK_TOKENS
        to_block = _sums_after(log_decay[..., : start + 1, :])[..., :start, :].exp()
        earlier = entering[..., index, :, :] @ (k[..., :start, :] * to_block).transpose(-1, -2)
        row = torch.cat([earlier.unflatten(-2, (-1, 2)), within[..., index, :, :, :]], dim=-1)
        rows.append(F.pad(row, (0, k.shape[-2] - row.shape[-1])))
    of_k, of_q = torch.cat(rows, dim=-3).unbind(-2)
    return of_k, of_q


def _decay_between(log_decay: Tensor) -> Tensor:
    """Return exp(sum of log_decay over j < s <= i) [..., i, j] for j <= i, 0 for j > i; log_decay
    [..., tokens].

    Summed pair by pair: the difference of two sums from the start would lose the digits of a small
    decay that follows a large one."""
    size = log_decay.shape[-1]
    pairs = torch.ones(size, size, dtype=torch.bool, device=log_decay.device)
    each = log_decay[..., None].expand(*log_decay.shape, size)
    sums = each.masked_fill(pairs.triu(), 0.0).cumsum(-2)
    return sums.masked_fill(pairs.triu(1), -torch.inf).exp()


def _decay_between_channels(log_decay: Tensor) -> Tensor:
    """Compute `_decay_between` by channel: log_decay [..., tokens, d] -> [..., i, j, d]; all sums
    in one product with a matrix of zeros and ones."""
    size = log_decay.shape[-2]
    token = torch.arange(size, device=log_decay.device)
    summed = (token[:, None, None] >= token) & (token > token[:, None])  # [i, j, s]
    sums = (summed.flatten(0, 1).to(log_decay.dtype) @ log_decay).unflatten(-2, (size, size))
    return sums.masked_fill((token > token[:, None])[..., None], -torch.inf).exp()


def _sums_after(log_decay: Tensor) -> Tensor:
    """Sum over the tokens after each one: [..., tokens, c] -> the same shape."""
    return F.pad(log_decay[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)
