"""Lightning Attention, one token at a time: the definition every faster form is tested against.

Source: arXiv 2601.22156: S_t = gamma S_(t-1) + k_t v_t^T, o_t = scale q_t S_t.
Never casts: float64 in, float64 out. Shapes: b batch, t tokens, h heads, k key dim, v value dim."""

import torch
from torch import Tensor


def naive_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q, k [b, t, h, k], v [b, t, h, v], log_decay [h] (per token, <= 0) -> o [b, t, h, v], final
    state [b, h, k, v].

    `document_ids` [b, t], non-decreasing along t: the state is cleared where the id changes, so no
    token sees another document. `initial_state` belongs to the document of the first token, the
    final state to that of the last."""
    b, t, h, dk = q.shape
    state = q.new_zeros(b, h, dk, v.shape[-1]) if initial_state is None else initial_state
    decay = log_decay.to(q.device, q.dtype).exp()[:, None, None]
    outs = []
    for i in range(t):
        if document_ids is not None and i > 0:
            same = document_ids[:, i] == document_ids[:, i - 1]
            state = torch.where(same[:, None, None, None], state, 0.0)
        state = decay * state + k[:, i, :, :, None] * v[:, i, :, None, :]
        outs.append(torch.einsum("bhk,bhkv->bhv", scale * q[:, i], state))
    return torch.stack(outs, dim=1), state
