"""How states cross chunk borders, as pure functions without process groups.

`Decay` is for mixers whose heads decay at fixed rates, `Transition` for mixers whose chunks
multiply a state by a matrix (the delta rules), `Shift` passes tokens to the next chunk. The rest of
this text is about `Decay`.

The sequence is cut into n chunks of C tokens. F_c is the state at the end of chunk c scanned from
zero, gamma the decay per token of a head. The recurrence S_t = gamma S_(t-1) + k_t v_t^T gives the
state that enters chunk c, and what it adds to an output at position t (from 0) of that chunk,
exactly:
    S_c = sum over c' < c of gamma^(C (c - 1 - c')) F_c'
    o_t += scale * gamma^(t + 1) * q_t S_c
The gradient goes in the opposite direction: dF_c' = sum over c > c' of gamma^(C (c - 1 - c')) dS_c.
A state belongs to a document. Ids do not decrease along a row, so F_c' reaches chunk c if and only
if the last token of c' and the first of c carry the same id, and within c it concerns only the
tokens of that id. Powers are taken in float64 from non-positive exponents: no slope or length
overflows, and far states vanish by underflow."""

from typing import Any, Protocol

import torch
from torch import Tensor


class Algebra(Protocol):
    """A rule that turns the summaries of all n chunks into the state that enters one of them, and
    its transpose."""

    def incoming(self, summaries: tuple[Tensor, ...], chunk: int) -> Tensor:
        """summaries [n, b, ...] each, in natural order -> the state that enters `chunk`, [b,
        ...]."""

    def summary_gradient(self, gradients: Tensor, chunk: int) -> tuple[Tensor, ...]:
        """Map gradients of all incoming states [n, b, ...] -> gradients of the summaries of
        `chunk`, [b, ...] each. It is called after `incoming`, which may have kept the summaries."""


class Shift:
    """Passes what a chunk sends (its last tokens) to the next chunk; the first one gets zeros."""

    def incoming(self, summaries: tuple[Tensor, ...], chunk: int) -> Tensor:
        """Return the summary of the chunk before."""
        (sent,) = summaries
        return sent[chunk - 1] if chunk else torch.zeros_like(sent[0])

    def summary_gradient(self, gradients: Tensor, chunk: int) -> tuple[Tensor, ...]:
        """Return the gradient of what entered the chunk after."""
        last = chunk + 1 == len(gradients)
        return (torch.zeros_like(gradients[0]) if last else gradients[chunk + 1],)


class Decay:
    """Chunks whose heads decay at fixed rates; the one summary is the final state F [b, h, k, v].

    `weights` come from `carry_weights`."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def incoming(self, summaries: tuple[Tensor, ...], chunk: int) -> Tensor:
        """Return the sum over c' < c of weights[c, c'] F_c'."""
        return incoming_state(summaries[0], self.weights, chunk)

    def summary_gradient(self, gradients: Tensor, chunk: int) -> tuple[Tensor, ...]:
        """Return the sum over c > c' of weights[c, c'] dS_c."""
        return (final_state_gradient(gradients, self.weights, chunk),)


class Transition:
    """Chunks that map a state by a matrix, S_out = M S_in + F (Gated DeltaNet, Kimi Delta
    Attention: M is the product of (I - beta k k^T) Diag(decay) over the chunk's tokens). Summaries
    are M [b, h, k, k] and F [b, h, k, v].

    With documents a chunk that holds a boundary has M = 0, because its state leaves it from the
    last document alone; and a state enters a chunk only where its first token continues the
    document before it: `continues` [n, b] (bool) or None. Then S_c = 0 where it does not continue,
    and otherwise M_(c-1) S_(c-1) + F_(c-1). The gradient of S_out of chunk c is G_c = [c+1
    continues] (dS_(c+1) + M_(c+1)^T G_(c+1)), and dM = G S_in^T, dF = G."""

    def __init__(self, continues: Tensor | None = None) -> None:
        self.continues = continues
        self.transitions: Tensor | None = None
        self.states: list[Tensor] = []

    def incoming(self, summaries: tuple[Tensor, ...], chunk: int) -> Tensor:
        """Return the state that enters `chunk`; all of them are computed in the first call and kept
        for backward."""
        if self.transitions is None:
            self.transitions, finals = summaries
            state = torch.zeros_like(finals[0])
            self.states = [state]
            for number in range(1, len(finals)):
                state = self._kept(
                    self.transitions[number - 1] @ state + finals[number - 1], number
                )
                self.states.append(state)
        return self.states[chunk]

    def summary_gradient(self, gradients: Tensor, chunk: int) -> tuple[Tensor, ...]:
        """Return dM and dF of `chunk`."""
        assert self.transitions is not None, "backward follows forward"
        leaving = torch.zeros_like(gradients[0])
        for number in range(len(gradients) - 1, chunk, -1):
            carried = self.transitions[number].transpose(-1, -2) @ leaving
            leaving = self._kept(gradients[number] + carried, number)
        return leaving @ self.states[chunk].transpose(-1, -2), leaving

    def _kept(self, state: Tensor, chunk: int) -> Tensor:
        if self.continues is None:
            return state
        return state * self.continues[chunk].to(state)[:, None, None, None]


def continuing_chunks(document_ids: Tensor | None, num_chunks: int) -> Tensor | None:
    """Return whether the first token of each chunk continues the document of the token before it:
    [n, b] bool (False for the first chunk), or None without documents. document_ids [b, n * C]."""
    if document_ids is None:
        return None
    ids = document_ids.unflatten(1, (num_chunks, -1))
    first = ids[:, 1:, 0].t()
    before = ids[:, :-1, -1].t()
    return torch.cat([torch.zeros_like(first[:1], dtype=torch.bool), first == before])


def carry_weights(
    log_decay: Tensor, chunk_tokens: int, num_chunks: int, document_ids: Tensor | None = None
) -> Tensor:
    """Return the factor that remains of F_c' at the start of chunk c: weights [c, c', b, h] in
    float64 (b = 1 without documents), zero for c' >= c.

    log_decay [h]; document_ids [b, num_chunks * chunk_tokens]."""
    chunk = torch.arange(num_chunks, device=log_decay.device)
    passed = (chunk[:, None] - 1 - chunk[None, :])[..., None, None]  # whole chunks between the two
    weights = torch.exp(log_decay.double() * chunk_tokens * passed.clamp(min=0)) * (passed >= 0)
    if document_ids is None:
        return weights
    ids = document_ids.unflatten(1, (num_chunks, chunk_tokens))
    # [chunk, b]
    first = ids[:, :, 0].t()
    last = ids[:, :, -1].t()
    return weights * (first[:, None] == last[None, :])[..., None].to(weights.device)


def incoming_state(final_states: Tensor, weights: Tensor, chunk: int) -> Tensor:
    """Return the state S that enters `chunk`: final_states [n, b, h, k, v], weights from
    `carry_weights`
    -> [b, h, k, v]."""
    return _weighted_sum(final_states[:chunk], weights[chunk, :chunk])


def final_state_gradient(incoming_gradients: Tensor, weights: Tensor, chunk: int) -> Tensor:
    """Compute the gradient of F of `chunk` from the gradients of all incoming states [n, b, h, k,
    v] -> [b, h, k, v]."""
    return _weighted_sum(incoming_gradients[chunk + 1 :], weights[chunk + 1 :, chunk])


def _weighted_sum(states: Tensor, weights: Tensor) -> Tensor:
    # a plain sum, no matrix product: states keep fp32 whatever torch.backends says about TF32
    return (states * weights.to(states.dtype)[..., None, None]).sum(0)


def read_factor(
    log_decay: Tensor, scale: float, chunk_tokens: int, document_ids: Tensor | None = None
) -> Tensor:
    """Return scale * gamma^(t + 1), and zero after the chunk's first document: [n, chunk_tokens, h]
    in float64 (n = 1 without documents).

    document_ids [n, chunk_tokens]: one row per chunk."""
    t = torch.arange(1, chunk_tokens + 1, device=log_decay.device)
    factor = scale * torch.exp(t[:, None] * log_decay.double())[None]
    return (
        factor
        if document_ids is None
        else factor * (document_ids == document_ids[:, :1])[..., None].to(factor.device)
    )


def add_incoming(o: Tensor, q: Tensor, state: Tensor, factor: Tensor) -> Tensor:
    """Compute o + factor * (q S): o [n, c, h, v] and q [n, c, h, k] of n chunks, state [n, h, k,
    v], factor [n or 1, c, h] -> like o.

    The product runs in q's dtype and accumulates in the state's; gradients flow to o, q and the
    state."""
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
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        d_state = torch.empty_like(state)
        for n in range(q.shape[0]):
            # [h, c, v]
            weighted = (
                (grad[n] * factor[min(n, factor.shape[0] - 1), :, :, None])
                .to(q.dtype)
                .transpose(0, 1)
            )
            dq[n] = (weighted @ state[n].to(q.dtype).transpose(-1, -2)).transpose(0, 1)
            d_state[n] = _product(q[n].permute(1, 2, 0), weighted, state.dtype)
        return grad, dq, d_state, None


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply batched a @ b of one dtype with the result in `dtype`, which has at least their
    precision."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda and hasattr(torch.ops.aten.bmm, "dtype"):  # since torch 2.8
        return torch.bmm(a, b, out_dtype=dtype)  # tensor cores on bf16 inputs, fp32 result
    return a.to(dtype) @ b.to(dtype)
