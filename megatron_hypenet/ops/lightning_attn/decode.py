"""Lightning Attention for one token of each of many requests, whose states lie in slots of one
cache: the step of an inference engine."""

from __future__ import annotations

from torch import Tensor

from megatron_hypenet.ops.lightning_attn.dispatch import runs_kernels


def lightning_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    states: Tensor,
    slots: Tensor,
    new: Tensor,
    *,
    scale: float,
) -> Tensor:
    """q, k [n, h, k], v [n, h, v], log_decay [h] -> o [n, h, v] in q's dtype.

    Row i continues `states[slots[i]]`, one of [slots, h, k, v] in fp32, which is replaced by the
    state after the token; where `new` [n] (bool), the state before is zero whatever the slot holds.
    `slots` [n] (int64) has no slot twice, but for slots that nothing reads. Each state has its
    elements in order; the distance between states is free."""
    if runs_kernels(q[None], v[None]):
        from megatron_hypenet.ops.lightning_attn.triton_decode import triton_lightning_decode

        return triton_lightning_decode(q, k, v, log_decay, states, slots, new, scale=scale)
    return torch_lightning_decode(q, k, v, log_decay, states, slots, new, scale=scale)


def torch_lightning_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    states: Tensor,
    slots: Tensor,
    new: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Compute `lightning_decode` with torch; states may be fp64 too."""
    dtype = states.dtype
    decay = log_decay.to(states.device, dtype).exp()[:, None, None]
    before = states.index_select(0, slots).masked_fill(new[:, None, None, None], 0.0)
    after = decay * before + k.to(dtype)[..., :, None] * v.to(dtype)[..., None, :]
    states.index_copy_(0, slots, after)
    return ((q.to(dtype) * scale)[..., None, :] @ after).squeeze(-2).to(q.dtype)
