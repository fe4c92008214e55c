"""Parts of which a HypeNet's layers in vLLM are made: projections, norms, the MLP."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader


class Positions(NamedTuple):
    """What the layers need to know of the positions of the step's tokens, in fp32."""

    cos: Tensor  # [T, 1, d]
    sin: Tensor
    query_scale: Tensor | None  # [T, 1, 1], or None


class MixerParts(nn.Module):
    """Projections of one mixer, its norms of q and k per head, and its output."""

    def __init__(
        self,
        config: Any,
        quant_config: Any,
        prefix: str,
        *,
        kv_heads: int,
        gate: str | None = None,
        qk_norm: bool = True,
    ) -> None:
        """Build the projections, those of q, k and v with biases if the model has any; `kv_heads`:
        heads of k and v over all ranks; `gate`: name of the gate's projection."""
        super().__init__()
        hidden = config.hidden_size
        heads = config.num_attention_heads
        options: dict[str, Any] = {"bias": False, "quant_config": quant_config}
        self.head_dim: int = config.head_dim
        self.qkv_proj = QKVParallelLinear(
            hidden,
            self.head_dim,
            heads,
            kv_heads,
            bias=config.qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.num_heads: int = self.qkv_proj.num_heads
        self.num_kv_heads: int = self.qkv_proj.num_kv_heads
        size = heads * self.head_dim
        self.gate_name = gate
        if gate is not None:
            linear = ColumnParallelLinear(hidden, size, prefix=f"{prefix}.{gate}", **options)
            self.add_module(gate, linear)
        self.o_proj = RowParallelLinear(size, hidden, prefix=f"{prefix}.o_proj", **options)
        if qk_norm:
            self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.has_norms = qk_norm

    def sections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, H] -> q [T, h * d], k and v [T, g * d]."""
        sizes = [n * self.head_dim for n in (self.num_heads, *[self.num_kv_heads] * 2)]
        q, k, v = self.qkv_proj(x)[0].split(sizes, dim=-1)
        return q, k, v

    def heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return sections as heads [T, h, d]; q and k normalised per head."""
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        if self.has_norms:
            q, k = self.q_norm(q.contiguous()), self.k_norm(k.contiguous())
        return q, k, v

    def gate_of(self, x: Tensor) -> Tensor:
        """x [T, H] -> the gate before its function, [T, h * d]."""
        return getattr(self, str(self.gate_name))(x)[0]


class NormOverRanks(nn.Module):
    """Root-mean-square norm over the channels of all tensor-parallel ranks: each rank has its part
    of them, so the squares are summed over the ranks."""

    def __init__(self, size: int, eps: float) -> None:
        """Build the norm; `size`: channels over all ranks."""
        super().__init__()
        self.size = size
        self.eps = eps
        self.ranks = get_tensor_model_parallel_world_size()
        self.weight = nn.Parameter(torch.ones(size // self.ranks))
        self.weight.weight_loader = sharded_weight_loader(0)  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x [T, channels of this rank] -> same shape and dtype."""
        wide = x.float()
        squares = wide.square().sum(-1, keepdim=True)
        if self.ranks > 1:
            squares = tensor_model_parallel_all_reduce(squares)
        return (wide * torch.rsqrt(squares / self.size + self.eps) * self.weight.float()).to(
            x.dtype
        )


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Any, quant_config: Any, prefix: str) -> None:
        """Read sizes from the configuration."""
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        options: dict[str, Any] = {"bias": False, "quant_config": quant_config}
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden, [inner] * 2, prefix=f"{prefix}.gate_up_proj", **options
        )
        self.down_proj = RowParallelLinear(inner, hidden, prefix=f"{prefix}.down_proj", **options)
        self.act = SiluAndMul()

    def forward(self, x: Tensor) -> Tensor:
        """x [T, H] -> [T, H]."""
        return self.down_proj(self.act(self.gate_up_proj(x)[0]))[0]


def sharded(shape: tuple[int, ...], axis: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """Return an empty parameter whose `axis` is split over the tensor-parallel ranks; `shape` is
    that over all ranks. `dtype` None: the model's."""
    ranks = get_tensor_model_parallel_world_size()
    local = [size // ranks if i == axis else size for i, size in enumerate(shape)]
    parameter = nn.Parameter(torch.empty(local, dtype=dtype), requires_grad=False)
    parameter.weight_loader = sharded_weight_loader(axis)  # type: ignore[attr-defined]
    return parameter
