"""The gated delta rule, one token at a time: the definition that every faster form is tested
against.

Source: Gated DeltaNet (arXiv 2412.06464, equation 10) and Kimi Delta Attention (arXiv 2510.26692).
Per head, with the state S [k, v] before a token and its log decay g (<= 0):
    S' = exp(g) S      (one factor for the head, or one for each row of S)
    S  = S' + beta k (v - k^T S')^T      o = scale * q^T S
So the state decays first, the prediction k^T S' reads the decayed state, and the output sees the
token itself.
Never casts: float64 in, float64 out. Shapes: b rows, t tokens, h heads, k and v channels."""

import torch
from torch import Tensor


def naive_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return outputs [b, t, h, v] and the final state [b, h, k, v].

    Args:
        q, k: [b, t, h, k]; whatever norm they need is done before.
        v: [b, t, h, v].
        log_decay: [b, t, h] or [b, t, h, k], <= 0.
        beta: [b, t, h], the size of the write.
        scale: factor of the outputs.
        initial_state: [b, h, k, v], of the document of each row's first token; None for zeros.
        document_ids: [b, t], not decreasing along t; the state restarts where they change."""
    b, t, h, dk = q.shape
    state = q.new_zeros(b, h, dk, v.shape[-1]) if initial_state is None else initial_state
    decay = per_channel(log_decay).exp()[..., None]  # [b, t, h, k or 1, 1]
    outs = []
    for i in range(t):
        if document_ids is not None and i:
            same = document_ids[:, i] == document_ids[:, i - 1]
            state = state * same[:, None, None, None]
        state = decay[:, i] * state
        key = k[:, i, :, :, None]  # [b, h, k, 1]
        error = v[:, i] - (key * state).sum(2)  # [b, h, v]
        state = state + beta[:, i, :, None, None] * key * error[:, :, None, :]
        outs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, i], state))
    return torch.stack(outs, dim=1), state


def per_channel(log_decay: Tensor) -> Tensor:
    """log_decay [b, t, h] or [b, t, h, k] -> [b, t, h, 1] or as it is."""
    return log_decay if log_decay.dim() == 4 else log_decay[..., None]
