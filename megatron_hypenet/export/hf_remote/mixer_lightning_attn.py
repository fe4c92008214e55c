"""Lightning attention of a HypeNet: linear attention with RoPE and a fixed decay per head.

Shapes: b rows, t new tokens, h heads, d head_dim, H hidden_size."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig

from .cache_hypenet import StateSlot
from .layers_hypenet import HypeNetMixer, HypeNetRMSNorm
from .ops_hypenet import (
    Step,
    accumulation_dtype,
    is_open,
    rotate,
    token_by_token,
    without_autocast,
)

_LIGHTNING_CHUNK_TOKENS = 128
_LIGHTNING_GROUP_TOKENS = 4096


class HypeNetLightningMixer(HypeNetMixer):
    """S_t = gamma S_(t-1) + k_t v_t^T, o_t = q_t S_t / sqrt(d), gamma fixed per head; one norm over
    all heads, then the gate."""

    hf_names = ("lightning-attn", "lightning_attn")

    def __init__(self, config: PretrainedConfig) -> None:
        """Sizes from the configuration."""
        super().__init__(config, kv_heads=config.num_attention_heads, gate="z_proj")
        self.o_norm = HypeNetRMSNorm(
            config.num_attention_heads * config.head_dim, config.rms_norm_eps
        )

    @staticmethod
    def settings(config: PretrainedConfig) -> dict[str, Sequence[Any]]:
        """The sizes are those of the attention, and every switch has one supported value."""
        return {
            "expand_kv_proj": (True,),
            "lightning_rope_scaling": (None,),
            "lightning_scale": ("1/sqrt(d)",),
            "lightning_use_output_gate": (True,),
            "lightning_use_output_norm": (True,),
            "lightning_use_qk_norm": (True,),
            "lightning_use_rope": (True,),
            "lightning_use_short_conv": (False,),
            "lightning_nh": (config.num_attention_heads,),
            "lightning_nkv": (config.num_attention_heads,),
            "lightning_head_dim": (config.head_dim,),
        }

    @staticmethod
    def shared(config: PretrainedConfig, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Decay of every head per real token: exp(-slope)."""
        return alibi_slopes(config.num_attention_heads, positions.device, dtype)

    @staticmethod
    def new_cache() -> StateSlot:
        """One matrix per head."""
        return StateSlot("Lightning")

    def forward(self, x: Tensor, step: Step, slot: StateSlot | None) -> Tensor:
        """x [b, t, H] -> [b, t, H]."""
        q, k, v = self.project(x)
        q, k = rotate(q, step.cos, step.sin), rotate(k, step.cos, step.sin)
        b, h, t, d = q.shape
        state = None if slot is None else slot.state
        if state is None:
            state = q.new_zeros(b, h, d, d, dtype=accumulation_dtype(q.dtype))
        slopes = step.shared[self.hf_names[0]].to(state.dtype)
        if t == 1:
            q, k, v = (y.to(state.dtype) for y in (q, k, v))
            o, state = lightning_step(q, k, v, state, slopes, step.new_real)
        else:
            o, state = lightning_chunks(q, k, v, state, slopes, step.new_real)
        if slot is not None:
            slot.update(state, new_tokens=t)
        o = (o / math.sqrt(d)).to(x.dtype).transpose(1, 2).flatten(2)
        return self.merge(self.o_norm(o), x)


def alibi_slopes(num_heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[h] slopes: 2^(-8(i+1)/n) for the power of two n <= h, then every second slope of the set for
    2n until h are there."""
    n = 1 << (num_heads.bit_length() - 1)
    exponents = torch.arange(1, n + 1, device=device, dtype=dtype) / n
    more = (1 + 2 * torch.arange(num_heads - n, device=device, dtype=dtype)) / (2 * n)
    return torch.exp2(-8.0 * torch.cat([exponents, more]))


@without_autocast
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


@without_autocast
def lightning_chunks(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, slopes: Tensor, new_real: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Any number of tokens: q, k, v [b, h, t, d], state [b, h, d, d] -> o [b, h, t, d] in the
    state's dtype, new state.

    Decay counts real tokens, so padding leaves a state as it was. Groups of chunks bound the memory
    to a few copies of q."""
    if is_open(q.shape[2]):
        return _lightning_tokens(q, k, v, state, slopes, new_real)
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


def _lightning_tokens(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, slopes: Tensor, new_real: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same for an open number of tokens."""
    decay = -slopes[:, None, None].expand(q.shape[0], -1, q.shape[2], 1)
    if new_real is not None:
        real = new_real[:, None, :, None].to(state.dtype)
        decay = decay * real
        k = k * real

    def step(
        state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor
    ) -> tuple[Tensor, Tensor]:
        state = decay.exp() * state + k.transpose(-1, -2) @ v
        return q @ state, state

    return token_by_token(step, state, *(x.to(state.dtype) for x in (q, k, v, decay)))


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


MIXER = HypeNetLightningMixer
