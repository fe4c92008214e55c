"""Lightning Attention for decoding: one token against a carried state (arXiv 2601.22156)."""

import torch
from torch import Tensor


def recurrent_lightning_attn_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """One token: q, k [b, h, k], v [b, h, v], log_decay [h], state [b, h, k, v] -> o [b, h, v] in
    v's dtype, new state.

    Works in the state's dtype (fp32, or float64 for float64 models): a state kept in bf16 would
    lose old tokens."""
    decay = log_decay.to(state.dtype).exp()[:, None, None]
    new_state = decay * state + k.to(state.dtype)[..., :, None] * v.to(state.dtype)[..., None, :]
    o = torch.einsum("bhk,bhkv->bhv", scale * q.to(state.dtype), new_state)
    return o.to(v.dtype), new_state
