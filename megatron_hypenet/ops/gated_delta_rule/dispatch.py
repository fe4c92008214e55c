"""Delta rules as models call them: flash-linear-attention's kernels where they run, else chunks in
torch. Here is the one with a decay per head; `ops/kimi_delta_attention` has one per key channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hypenet.ops.gated_delta_rule.chunked import (
    chunked_gated_delta_rule,
    chunked_gated_delta_summary,
)
from megatron_hypenet.ops.gated_delta_rule.fla import Kernel, kernel_fits, run_kernel
from megatron_hypenet.ops.kernels import enabled, kernel_family


@dataclass(frozen=True)
class DeltaRule:
    """A delta rule over whole rows of tokens. A call is the recurrence; `summary` is the effect of
    the tokens on a state, which ranks exchange under context parallelism."""

    family: str
    """The family of its kernels in `HYPENET_DISABLE_KERNELS`."""
    load_kernel: Callable[[], Kernel]
    """Import the chunk kernel of flash-linear-attention."""

    def __call__(
        self,
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
        """Return outputs [b, t, h, v] in q's dtype and the final state [b, h, k, v] in float32
        (float64 for float64 inputs); arguments as in `naive_gated_delta_rule`."""
        inputs = (q, k, v, log_decay, beta)
        if self.runs_kernels(q):
            return run_kernel(
                self.load_kernel(),
                *inputs,
                scale=scale,
                initial_state=initial_state,
                document_ids=document_ids,
            )
        return chunked_gated_delta_rule(
            *inputs, scale=scale, initial_state=initial_state, document_ids=document_ids
        )

    def summary(
        self,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        *,
        document_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the transition M [b, h, k, k] and the state from zero B [b, h, k, v] of all
        tokens; see `chunked_gated_delta_summary`."""
        if self.runs_kernels(k):
            return summary_from_states(self, k, v, log_decay, beta, document_ids)
        return chunked_gated_delta_summary(k, v, log_decay, beta, document_ids=document_ids)

    def runs_kernels(self, x: Tensor) -> bool:
        """Return whether the kernels take tensors like x [b, t, h, d]."""
        return x.is_cuda and enabled(self.family) and kernel_fits(x.dtype, x.shape[-1])


def register_delta_rule(family: str, load_kernel: Callable[[], Kernel], *, check: str) -> DeltaRule:
    """Make a delta rule whose kernels are a family of their own; `check` is `module:function`."""
    register = kernel_family(
        family,
        fits=lambda use: kernel_fits(use.dtype, use.head_dim),
        check=check,
        checked_uses=({"head_dim": 64, "thorough": False}, {"documents": True}),
    )
    return register(DeltaRule(family, load_kernel))


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


def _load_kernel() -> Kernel:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule


gated_delta_rule = register_delta_rule(
    "gated_delta_rule",
    _load_kernel,
    check="megatron_hypenet.ops.gated_delta_rule.selftest:check_gated_delta_rule_use",
)
"""The delta rule with one decay per head: log_decay [b, t, h]."""
