"""Check the kernel of Kimi Delta Attention against chunks in float64."""

from __future__ import annotations

import torch

from megatron_hypenet.ops.gated_delta_rule.selftest import check_delta_rule
from megatron_hypenet.ops.kernels import KernelUse
from megatron_hypenet.ops.kimi_delta_attention import kimi_delta_attention
from megatron_hypenet.ops.selftest import KernelCheck


def check_kimi_delta_attention_use(where: torch.device, use: KernelUse) -> KernelCheck:
    """Return the check of family kimi_delta_attention for a model's use of it."""
    return check_delta_rule(kimi_delta_attention, where, use, per_channel=True)
