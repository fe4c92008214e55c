"""The gated delta rule with one decay per head: flash-linear-attention's kernels where they run,
else chunks in torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_hypenet.ops.gated_delta_rule.chunked import (
    chunked_gated_delta_rule,
    chunked_gated_delta_summary,
)
from megatron_hypenet.ops.gated_delta_rule.fla import kernel_fits, run_kernel
from megatron_hypenet.ops.kernels import enabled, kernel_family

FAMILY = "gated_delta_rule"


@kernel_family(
    FAMILY,
    fits=lambda use: kernel_fits(use.dtype, use.head_dim),
    check="megatron_hypenet.ops.gated_delta_rule.selftest:check_gated_delta_rule_use",
    checked_uses=({"head_dim": 64, "thorough": False}, {"documents": True}),
)
def gated_delta_rule(
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
    for float64 inputs); arguments as in `naive_gated_delta_rule`, log_decay [b, t, h]."""
    given = {"scale": scale, "initial_state": initial_state, "document_ids": document_ids}
    if runs_kernels(FAMILY, q):
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return run_kernel(chunk_gated_delta_rule, q, k, v, log_decay, beta, **given)  # type: ignore[arg-type]
    return chunked_gated_delta_rule(q, k, v, log_decay, beta, **given)  # type: ignore[arg-type]


def gated_delta_summary(
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
        return summary_from_states(gated_delta_rule, k, v, log_decay, beta, document_ids)
    return chunked_gated_delta_summary(k, v, log_decay, beta, document_ids=document_ids)


def runs_kernels(family: str, x: Tensor) -> bool:
    """Return whether kernels of `family` take tensors like x [b, t, h, d]."""
    return x.is_cuda and enabled(family) and kernel_fits(x.dtype, x.shape[-1])


def summary_from_states(
    rule: Callable[..., tuple[Tensor, Tensor]],
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    document_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the summary from two final states of `rule`: B from zero, and M from the unit matrix
    where nothing is written."""
    options = {"scale": 1.0, "document_ids": document_ids}
    _, written = rule(k, k, v, log_decay, beta, **options)
    unit = torch.eye(k.shape[-1], device=k.device).expand(*written.shape[:2], -1, -1)
    nothing = torch.zeros_like(k)
    _, transition = rule(k, k, nothing, log_decay, beta, initial_state=unit, **options)
    return transition, written
