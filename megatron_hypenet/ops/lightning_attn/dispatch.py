"""The front of Lightning Attention: one signature, the fastest form that runs where the tensors are."""

from torch import Tensor

from megatron_hypenet.ops.lightning_attn.chunked import chunked_lightning_attn, chunked_lightning_state


def lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q, k [b, t, h, k], v [b, t, h, v], log_decay [h] (fp32 or wider, <= 0) -> o [b, t, h, v] in q's dtype, final state [b, h, k, v].

    `document_ids` [b, t] (integer, non-decreasing along t) separates packed documents. `initial_state` belongs to the document of the
    row's first token, the final state to that of its last token. Accumulates and returns the state in fp32, in fp64 for fp64 inputs.
    Gradients reach q, k, v and initial_state, from o and from the final state; log_decay is a constant."""
    return chunked_lightning_attn(q, k, v, log_decay, scale=scale, initial_state=initial_state, document_ids=document_ids)


def lightning_state(k: Tensor, v: Tensor, log_decay: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
    """The final state of `lightning_attn` from a zero state, without outputs: k [b, t, h, k], v [b, t, h, v] -> [b, h, k, v]."""
    return chunked_lightning_state(k, v, log_decay, document_ids=document_ids)
