"""Lightning Attention, one token at a time: the definition every faster form is tested against.

Source: MODEL equation `S_t = gamma S_(t-1) + k_t v_t^T`, `o_t = scale q_t S_t` (arXiv 2601.22156). Never casts: float64 in, float64 out.
Shapes: b batch, t tokens, h heads, k key dim, v value dim."""

import torch
from torch import Tensor


def naive_lightning_attn(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q, k [b, t, h, k], v [b, t, h, v], log_decay [h] (per token, <= 0) -> o [b, t, h, v], final state [b, h, k, v]."""
    b, t, h, dk = q.shape
    state = q.new_zeros(b, h, dk, v.shape[-1]) if initial_state is None else initial_state
    decay = log_decay.to(q.dtype).exp()[:, None, None]
    outs = []
    for i in range(t):
        state = decay * state + k[:, i, :, :, None] * v[:, i, :, None, :]
        outs.append(torch.einsum("bhk,bhkv->bhv", scale * q[:, i], state))
    return torch.stack(outs, dim=1), state
