"""Kimi Delta Attention's recurrence (arXiv 2510.26692): the gated delta rule with one decay per key
channel. flash-linear-attention's kernels where they run, else chunks in torch."""

from megatron_hypenet.ops.gated_delta_rule.dispatch import register_delta_rule
from megatron_hypenet.ops.gated_delta_rule.fla import Kernel


def _load_kernel() -> Kernel:
    from fla.ops.kda import chunk_kda

    return chunk_kda


kimi_delta_attention = register_delta_rule(
    "kimi_delta_attention",
    _load_kernel,
    check="megatron_hypenet.ops.kimi_delta_attention.selftest:check_kimi_delta_attention_use",
)
"""The delta rule with one decay per key channel: log_decay [b, t, h, k]."""
