"""Kimi Delta Attention's recurrence (arXiv 2510.26692): the gated delta rule with one decay per key
channel. flash-linear-attention's kernels where they run, else chunks in torch."""

from __future__ import annotations

from torch import Tensor

from megatron_hypenet.ops.gated_delta_rule.chunked import (
    chunked_gated_delta_rule,
    chunked_gated_delta_summary,
)
from megatron_hypenet.ops.gated_delta_rule.dispatch import runs_kernels, summary_from_states
from megatron_hypenet.ops.gated_delta_rule.fla import kernel_fits, run_kernel
from megatron_hypenet.ops.kernels import kernel_family

FAMILY = "kimi_delta_attention"


@kernel_family(
    FAMILY,
    fits=lambda use: kernel_fits(use.dtype, use.head_dim),
    check="megatron_hypenet.ops.kimi_delta_attention.selftest:check_kimi_delta_attention_use",
    checked_uses=({"head_dim": 64, "thorough": False}, {"documents": True}),
)
def kimi_delta_attention(
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
    """Return outputs [b, t, h, v] in q's dtype and the final state [b, h, k, v] in float32 (float64
    for float64 inputs); arguments as in `naive_gated_delta_rule`, log_decay [b, t, h, k]."""
    given = {"scale": scale, "initial_state": initial_state, "document_ids": document_ids}
    if runs_kernels(FAMILY, q):
        from fla.ops.kda import chunk_kda

        return run_kernel(chunk_kda, q, k, v, log_decay, beta, **given)  # type: ignore[arg-type]
    return chunked_gated_delta_rule(q, k, v, log_decay, beta, **given)  # type: ignore[arg-type]


def kimi_delta_summary(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the transition M [b, h, k, k] and the state from zero B [b, h, k, v] of all tokens;
    see `chunked_gated_delta_summary`."""
    if runs_kernels(FAMILY, k):
        return summary_from_states(kimi_delta_attention, k, v, log_decay, beta, document_ids)
    return chunked_gated_delta_summary(k, v, log_decay, beta, document_ids=document_ids)
