"""How the states of Lightning Attention cross chunk borders: pure functions, no process group.

The sequence is cut into n chunks of C tokens. F_c is the state at the end of chunk c scanned from zero, gamma the decay per token of a
head. The recurrence S_t = gamma S_(t-1) + k_t v_t^T gives the state that enters chunk c, and what it adds to an output at position t
(from 0) of that chunk, exactly:
    S_c = sum over c' < c of gamma^(C (c - 1 - c')) F_c'          o_t += scale * gamma^(t + 1) * q_t S_c
The gradient runs the mirror way: dF_c' = sum over c > c' of gamma^(C (c - 1 - c')) dS_c.
A state belongs to a document. Ids do not decrease along a row, so F_c' reaches chunk c if and only if the last token of c' and the first
of c carry the same id, and within c it concerns only the tokens of that id.
Powers are taken in float64 from non-positive exponents: no slope or length overflows, and far states vanish by underflow."""

from typing import Any

import torch
from torch import Tensor


def carry_weights(log_decay: Tensor, chunk_tokens: int, num_chunks: int, document_ids: Tensor | None = None) -> Tensor:
    """What remains of F_c' at the start of chunk c: weights [c, c', b, h] in float64 (b = 1 without documents), zero for c' >= c.

    log_decay [h]; document_ids [b, num_chunks * chunk_tokens]."""
    chunk = torch.arange(num_chunks, device=log_decay.device)
    passed = (chunk[:, None] - 1 - chunk[None, :])[..., None, None]  # whole chunks between the two
    weights = torch.exp(log_decay.double() * chunk_tokens * passed.clamp(min=0)) * (passed >= 0)
    if document_ids is None:
        return weights
    ids = document_ids.unflatten(1, (num_chunks, chunk_tokens))
    first, last = ids[:, :, 0].t(), ids[:, :, -1].t()  # [chunk, b]
    return weights * (first[:, None] == last[None, :])[..., None].to(weights.device)


def incoming_state(final_states: Tensor, weights: Tensor, chunk: int) -> Tensor:
    """The state S that enters `chunk`: final_states [n, b, h, k, v], weights from `carry_weights` -> [b, h, k, v]."""
    return _weighted_sum(final_states[:chunk], weights[chunk, :chunk])


def final_state_gradient(incoming_gradients: Tensor, weights: Tensor, chunk: int) -> Tensor:
    """Gradient of F of `chunk` from those of all incoming states [n, b, h, k, v] -> [b, h, k, v]."""
    return _weighted_sum(incoming_gradients[chunk + 1 :], weights[chunk + 1 :, chunk])


def _weighted_sum(states: Tensor, weights: Tensor) -> Tensor:
    # a plain sum, no matrix product: states keep fp32 whatever torch.backends says about TF32
    return (states * weights.to(states.dtype)[..., None, None]).sum(0)


def read_factor(log_decay: Tensor, scale: float, chunk_tokens: int, document_ids: Tensor | None = None) -> Tensor:
    """scale * gamma^(t + 1), and zero after the chunk's first document: [n, chunk_tokens, h] in float64 (n = 1 without documents).

    document_ids [n, chunk_tokens]: one row per chunk."""
    t = torch.arange(1, chunk_tokens + 1, device=log_decay.device)
    factor = scale * torch.exp(t[:, None] * log_decay.double())[None]
    return factor if document_ids is None else factor * (document_ids == document_ids[:, :1])[..., None].to(factor.device)


def add_incoming(o: Tensor, q: Tensor, state: Tensor, factor: Tensor) -> Tensor:
    """o + factor * (q S): o [n, c, h, v] and q [n, c, h, k] of n chunks, state [n, h, k, v], factor [n or 1, c, h] -> like o.

    The product runs in q's dtype and accumulates in the state's; gradients flow to o, q and the state."""
    return _AddIncoming.apply(o, q, state, factor.to(state.dtype))


class _AddIncoming(torch.autograd.Function):
    """Row by row of n: the largest temporary is one chunk's output in the state's dtype."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, q: Tensor, state: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(q, state, factor)
        out = torch.empty_like(o, memory_format=torch.contiguous_format)
        for n in range(o.shape[0]):
            read = _product(q[n].transpose(0, 1), state[n].to(q.dtype), state.dtype).transpose(0, 1)
            out[n] = torch.addcmul(o[n], read, factor[min(n, factor.shape[0] - 1), :, :, None])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, state, factor = ctx.saved_tensors
        dq, d_state = torch.empty_like(q, memory_format=torch.contiguous_format), torch.empty_like(state)
        for n in range(q.shape[0]):
            weighted = (grad[n] * factor[min(n, factor.shape[0] - 1), :, :, None]).to(q.dtype).transpose(0, 1)  # [h, c, v]
            dq[n] = (weighted @ state[n].to(q.dtype).transpose(-1, -2)).transpose(0, 1)
            d_state[n] = _product(q[n].permute(1, 2, 0), weighted, state.dtype)
        return grad, dq, d_state, None


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Batched a @ b of one dtype with the result in `dtype`, which is at least as wide."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda and hasattr(torch.ops.aten.bmm, "dtype"):  # since torch 2.8
        return torch.bmm(a, b, out_dtype=dtype)  # tensor cores on bf16 inputs, fp32 result
    return a.to(dtype) @ b.to(dtype)
