"""The gated delta rule: its definition, and a chunked form with the chunk summaries that context
parallelism exchanges.

Gated DeltaNet (arXiv 2412.06464) has one decay per head and token, Kimi Delta Attention (arXiv
2510.26692) one per key channel; every function here takes either."""

from megatron_hypenet.ops.gated_delta_rule.chunked import (
    chunked_gated_delta_rule,
    chunked_gated_delta_summary,
)
from megatron_hypenet.ops.gated_delta_rule.dispatch import DeltaRule, gated_delta_rule
from megatron_hypenet.ops.gated_delta_rule.naive import naive_gated_delta_rule

__all__ = [
    "DeltaRule",
    "chunked_gated_delta_rule",
    "chunked_gated_delta_summary",
    "gated_delta_rule",
    "naive_gated_delta_rule",
]
