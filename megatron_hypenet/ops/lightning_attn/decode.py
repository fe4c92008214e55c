"""Lightning Attention for one token of each of many requests, whose states lie in slots of one
cache: the step of an inference engine."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_hypenet.ops.lightning_attn.dispatch import runs_kernels


@dataclass(frozen=True, slots=True)
class StateSlots:
    """The states of n requests in one cache; a step replaces them in place."""

    cache: Tensor
    """[slots, h, k, v] in fp32. Each state has its elements in order; the distance between states
    is free."""
    places: Tensor
    """[n] int64: the slot of each request; none twice, but for slots that nothing reads."""
    new: Tensor
    """[n] bool: where the state before the token is zero, whatever the slot holds."""


def lightning_decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, states: StateSlots, *, scale: float
) -> Tensor:
    """q, k [n, h, k], v [n, h, v], log_decay [h] -> o [n, h, v] in q's dtype.

    Row i continues the state of request i, which is replaced by the state after the token."""
    if runs_kernels(q[None], v[None]):
        from megatron_hypenet.ops.lightning_attn.triton_decode import triton_lightning_decode

        return triton_lightning_decode(q, k, v, log_decay, states, scale=scale)
    return torch_lightning_decode(q, k, v, log_decay, states, scale=scale)


def torch_lightning_decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, states: StateSlots, *, scale: float
) -> Tensor:
    """Compute `lightning_decode` with torch; states may be fp64 too."""
    dtype = states.cache.dtype
    decay = log_decay.to(states.cache.device, dtype).exp()[:, None, None]
    before = states.cache.index_select(0, states.places)
    before = before.masked_fill(states.new[:, None, None, None], 0.0)
    after = decay * before + k.to(dtype)[..., :, None] * v.to(dtype)[..., None, :]
    states.cache.index_copy_(0, states.places, after)
    return ((q.to(dtype) * scale)[..., None, :] @ after).squeeze(-2).to(q.dtype)
