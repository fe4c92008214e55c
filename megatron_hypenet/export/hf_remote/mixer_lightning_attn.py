"""Lightning attention of a HypeNet: linear attention with RoPE and a fixed decay per head.

Shapes: b rows, t new tokens, h heads, d head_dim, H hidden_size."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.torch_version import TorchVersion
from transformers import PretrainedConfig

from .layers_hypenet import HypeNetMixer, HypeNetRMSNorm
from .ops_hypenet import (
    Step,
    accumulation_dtype,
    is_open,
    rotate,
    token_by_token,
    without_autocast,
)
from .slots_hypenet import StateSlot

_CHUNK_TOKENS = {False: 128, True: 256}
"""Tokens per chunk, on a GPU or not."""
_GROUP_TOKENS = 16384
_HAS_WIDE_PRODUCT = TorchVersion(torch.__version__) >= "2.8"
"""Whether products of bf16 can come out in fp32."""


class HypeNetLightningMixer(HypeNetMixer):
    """S_t = gamma S_(t-1) + k_t v_t^T, o_t = q_t S_t / sqrt(d), gamma fixed per head; one norm over
    all heads, then the gate."""

    hf_names = ("lightning-attn", "lightning_attn")
    steps_in_place = True

    def __init__(self, config: PretrainedConfig) -> None:
        """Read sizes from the configuration."""
        super().__init__(config, kv_heads=config.num_attention_heads, gate="z_proj")
        self.o_norm = HypeNetRMSNorm(
            config.num_attention_heads * config.head_dim, config.rms_norm_eps
        )

    @staticmethod
    def settings(config: PretrainedConfig) -> dict[str, Sequence[Any]]:
        """Return the allowed values: the sizes are those of the attention, and every switch has one
        supported value."""
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
        """Return the decay of every head per real token: exp(-slope)."""
        return alibi_slopes(config.num_attention_heads, positions.device, dtype)

    @staticmethod
    def new_cache() -> StateSlot:
        """Return a slot for one matrix per head."""
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
    """Return the slopes [h]: 2^(-8(i+1)/n) for the power of two n <= h, then every second slope of
    the set for 2n until h are there."""
    n = 1 << (num_heads.bit_length() - 1)
    exponents = torch.arange(1, n + 1, device=device, dtype=dtype) / n
    more = (1 + 2 * torch.arange(num_heads - n, device=device, dtype=dtype)) / (2 * n)
    return torch.exp2(-8.0 * torch.cat([exponents, more]))


@without_autocast
def lightning_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, slopes: Tensor, new_real: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Process one token: q, k, v [b, h, 1, d], state [b, h, d, d] -> o [b, h, 1, d], new state. A
    padded row keeps its state."""
    decay = torch.exp(-slopes)[:, None, None]
    new = decay * state + k.transpose(-1, -2) @ v
    if new_real is not None:
        new = torch.where(new_real[:, None, :, None], new, state)
    return q @ new, new


@without_autocast
def lightning_chunks(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, slopes: Tensor, new_real: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Process any number of tokens: q, k, v [b, h, t, d], state [b, h, d, d] -> o [b, h, t, d] in
    the dtype of `_product_dtype`, new state.

    Decay counts real tokens, so padding leaves a state as it was. Groups of chunks bound the memory
    to a few copies of q."""
    if is_open(q.shape[2]):
        return _lightning_tokens(q, k, v, state, slopes, new_real)
    t = q.shape[2]
    dtype = _product_dtype(q, state)
    chunk = _CHUNK_TOKENS[q.is_cuda]
    group = _group_tokens(q)
    outputs = []
    start = 0
    while start < t:
        count = min(group, t - start)
        # whole chunks alone: their decays are the same for all
        count = count // chunk * chunk or count
        part = slice(start, start + count)
        size = min(chunk, count)
        qc, kc, vc = (
            x[:, :, part].to(dtype).unflatten(2, (-1, size)).contiguous() for x in (q, k, v)
        )  # [b, h, n, size, d]
        if new_real is None:
            decay = -slopes[:, None] * torch.arange(1, size + 1, device=q.device)
            within = decay[None, :, None]
            chunks = torch.arange(1, count // size + 1, device=q.device)
            ends = (decay[:, -1:] * chunks)[None]
        else:
            real = new_real[:, part].to(state.dtype).unflatten(1, (-1, size))
            kc = kc * real[:, None, :, :, None].to(dtype)
            within = -slopes[:, None, None] * real.cumsum(2)[:, None]
            ends = within[..., -1].cumsum(2)
        o, state = _lightning_group(qc, kc, vc, state, within, ends)
        outputs.append(o.flatten(2, 3))
        start += count
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0], state


def _product_dtype(q: Tensor, state: Tensor) -> torch.dtype:
    """Return the dtype of products: bf16 on a GPU, whose tensor cores sum in fp32; elsewhere, and
    for gradients, that of the state. fp16 is too narrow for sums over a long text."""
    fast = q.is_cuda and q.dtype == torch.bfloat16 and not torch.is_grad_enabled()
    return q.dtype if fast else state.dtype


def _lightning_tokens(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, slopes: Tensor, new_real: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute `lightning_chunks` for an open number of tokens."""
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
    """Return the number of tokens to work on at once: many chunks fill a GPU and need few launches,
    one chunk stays in a CPU's cache (twice as fast)."""
    chunk = _CHUNK_TOKENS[q.is_cuda]
    return max(chunk, _GROUP_TOKENS // q.shape[0] // chunk * chunk) if q.is_cuda else chunk


def _lightning_group(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, within: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """Process all chunks of a group at once: q, k, v [b, h, n, chunk, d] -> o of the same shape,
    new state.

    `within` [b or 1, h, n or 1, chunk]: log decay from the start of a chunk to each token, `ends`
    [b or 1, h, n] from the start of the group to each chunk's end, never growing. A token sees its
    own chunk by (q k^T * decay) v, and all before by q times the state at the start of its chunk.
    Every exponent is <= 0, so strong decay ends in 0 and never overflows."""
    dtype = q.dtype
    o = (q @ k.transpose(-1, -2) * _decay(within, within, 0).to(dtype)) @ v
    to_end = (within[..., -1:] - within).exp()[..., None].to(dtype)
    added = _product((k * to_end).transpose(-1, -2), v, state.dtype)  # [b, h, n, d, d]
    begin = F.pad(ends[..., :-1], (1, 0))
    starts = begin.exp()[..., None, None] * state[:, :, None]
    starts = starts + (_decay(begin, ends, -1) @ added.flatten(3)).view_as(added)
    o = o + (q * within.exp()[..., None].to(dtype)) @ starts.to(dtype)
    state = (ends - begin)[..., -1].exp()[..., None, None] * starts[:, :, -1] + added[:, :, -1]
    return o, state


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply a [..., m, k] @ b [..., k, n], in `dtype`."""
    if a.dtype == dtype:
        return a @ b
    if not (a.is_cuda and _HAS_WIDE_PRODUCT):
        return a.to(dtype) @ b.to(dtype)
    product = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=dtype)
    return product.view(*a.shape[:-1], b.shape[-1])


def _decay(to: Tensor, since: Tensor, diagonal: int) -> Tensor:
    """Return exp(to_i - since_j) [..., i, j] on and below the given diagonal, 0 above it."""
    between = to[..., :, None] - since[..., None, :]
    below = torch.ones(between.shape[-2:], dtype=torch.bool, device=to.device).tril(diagonal)
    return between.masked_fill(~below, -torch.inf).exp()


MIXER = HypeNetLightningMixer
