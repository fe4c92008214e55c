"""RMSNorm modules that are correct under tensor and sequence parallelism.

Megatron's own norm without Apex or Transformer Engine refuses sequence parallelism, and no norm of
Megatron's spans heads that lie on several ranks. Weight times normalised value (no `1 + weight`),
statistics in fp32 or wider."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_hypenet.ops.dtypes import accumulation_dtype
from megatron_hypenet.ops.gated_norm import gated_norm
from megatron_hypenet.ops.norm_rope import norm_rope
from megatron_hypenet.ops.rms_norm import residual_rms_norm, rms_norm
from megatron_hypenet.ops.sigmoid_gate import sigmoid_gate
from megatron_hypenet.parallel.groups import tensor_group


class RMSNorm(torch.nn.Module):
    """RMSNorm over the last dimension, built by Megatron's layer specs as `cls(config=,
    hidden_size=, eps=)`.

    `per_head=True` is Qwen3's q/k norm: one weight of length head_dim shared by all heads, so each
    tensor-parallel rank sees only the gradient of its own heads; under sequence parallelism every
    norm sees only its own tokens. Both sums are completed in the graph."""

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-6,
        per_head: bool = False,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.per_head = per_head
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.partial_gradient = config.tensor_model_parallel_size > 1 and (
            per_head or config.sequence_parallel
        )

    def forward(
        self,
        x: Tensor,
        angles: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        prenorm: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x [..., hidden_size] -> the same shape and dtype; per head, x [t, b, heads, d] is also
        rotated by RoPE `angles` [t, 1, 1, d].

        With `prenorm` it returns (norm of total, total), where total is x plus the `residual` if
        there is one, as a pre-norm layer needs them. This is not a method of its own, because
        ZeRO-3 gathers the weight for a module's call."""
        weight: Tensor = self.weight
        if self.partial_gradient:
            weight = sum_gradient(weight, tensor_group())
        if prenorm:
            return residual_rms_norm(x, residual, weight, self.eps)
        return (
            norm_rope(x, weight, angles, self.eps)
            if self.per_head
            else rms_norm(x, weight, self.eps)
        )


class AllHeadsRMSNorm(torch.nn.Module):
    """HypeNet's `o_norm` and the gate after it: one RMSNorm over heads * head_dim, whose heads are
    split over the tensor-parallel ranks.

    The mean of squares is a sum over ranks (one all-reduce of [tokens, 1] each way); the weight is
    split like the heads."""

    def __init__(
        self, config: TransformerConfig, local_size: int, group: dist.ProcessGroup
    ) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.group = group
        self.weight = torch.nn.Parameter(torch.ones(local_size, dtype=config.params_dtype))
        # Read by DeepSpeed's gradient norm and by the sharded checkpoint.
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim = 0  # type: ignore[attr-defined]
        self.weight.partition_stride = 1  # type: ignore[attr-defined]

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x, gate [t, b, local heads * head_dim] -> norm of x times sigmoid(gate), in x's shape and
        dtype; on one rank in one pass."""
        if self.group.size() == 1:
            return gated_norm(x, gate, self.weight, self.eps)
        return sigmoid_gate(_SplitRMSNorm.apply(x, self.weight, self.eps, self.group), gate)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Return the weight as one logical vector of all heads."""
        own: dict[str, Tensor] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(own, prefix, {"weight": 0}, sharded_offsets)


def sum_gradient(weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return `weight`, which all ranks of the group hold and each uses for a part of the heads or
    tokens, with a gradient that is summed over them."""
    summed: Tensor = _SumGradient.apply(weight, group)
    return summed


class _SumGradient(torch.autograd.Function):
    """Identity whose gradient is summed over a group, in fp32: completes the partial gradient of a
    replicated weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = grad.to(accumulation_dtype(grad.dtype), copy=True)
        dist.all_reduce(total, group=ctx.group)
        return total.to(grad.dtype), None


class _SplitRMSNorm(torch.autograd.Function):
    """RMSNorm of a vector split over a group: y = w x r with r = (mean over all ranks of x^2 +
    eps)^(-1/2).

    dx = r (w dy) - x r^3 / N * sum over ranks of (w dy x); dw = sum over tokens of dy x r, local
    because w is split."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, group: dist.ProcessGroup
    ) -> Tensor:
        x_accumulated = x.to(accumulation_dtype(x.dtype))
        total = x_accumulated.square().sum(-1, keepdim=True)
        dist.all_reduce(total, group=group)
        ctx.width = x.shape[-1] * group.size()
        inverse_rms = (total / ctx.width + eps).rsqrt()
        ctx.group = group
        ctx.save_for_backward(x, weight, inverse_rms)
        return weight * (x_accumulated * inverse_rms).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        x, weight, inverse_rms = ctx.saved_tensors
        x_accumulated, dy = x.to(inverse_rms.dtype), grad.to(inverse_rms.dtype)
        weighted = dy * weight.to(inverse_rms.dtype)
        dot = (weighted * x_accumulated).sum(-1, keepdim=True)
        dist.all_reduce(dot, group=ctx.group)
        dx = weighted * inverse_rms - x_accumulated * (inverse_rms.pow(3) * dot / ctx.width)
        dw = (dy * x_accumulated * inverse_rms).reshape(-1, x.shape[-1]).sum(0)
        return dx.to(x.dtype), dw.to(weight.dtype), None, None
