"""Modules of which a HypeNet's mixers are made, and the interface of a mixer.

A file `mixer_<name>.py` holds one mixer and ends with `MIXER = <its class>`. Shapes: b rows, t new
tokens, h heads, g key/value heads, d head_dim, H hidden_size."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from .ops_hypenet import Step
from .slots_hypenet import CacheSlot


class HypeNetRMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        """Build the norm; `size`: length of the last dimension."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> same shape and dtype."""
        # under autocast the weight is in fp32, and torch has no fused norm of two dtypes
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class HypeNetMixer(nn.Module):
    """Base of all mixers: projections, optional norms of q and k per head, the gated output."""

    hf_names: ClassVar[tuple[str, ...]] = ()
    """Entries of `mixer_types` that stand for the mixer; the first is the one that is written."""
    kept_in_fp32: ClassVar[tuple[str, ...]] = ()
    """Parameters that stay in fp32 when a model is loaded in fp16 or bf16."""
    steps_in_place: ClassVar[bool] = False
    """Whether `forward` of one token, without gradients, can be captured in a CUDA graph: it reads
    no value of a tensor, updates its slot in place (StateSlot.update, in_memory_of), and with
    `step.at` takes the number of columns from there alone."""

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        kv_heads: int | None = None,
        gate: str | None = None,
        qk_norm: bool = True,
    ) -> None:
        """Build the projections, those of q, k and v with biases if the model has any; `kv_heads`:
        heads of k and v, None for those of softmax attention; `gate`: name of the gate's
        projection, None without."""
        super().__init__()
        self.config = config
        self.gate_name = gate
        query_size = config.num_attention_heads * config.head_dim
        kv_size = (kv_heads or config.num_key_value_heads) * config.head_dim
        biased = config.qkv_bias
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=biased)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=biased)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=biased)
        if gate is not None:
            self.add_module(gate, nn.Linear(config.hidden_size, query_size, bias=False))
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        norm_q, norm_k = (
            HypeNetRMSNorm(config.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity()
            for _ in range(2)
        )
        self.q_norm = norm_q
        self.k_norm = norm_k

    @staticmethod
    def settings(config: PretrainedConfig) -> dict[str, Sequence[Any]]:
        """Return the keys of config.json that the mixer reads, with the values that each may have;
        the first one is the default, and a range has none."""
        return {}

    @staticmethod
    def shared(config: PretrainedConfig, positions: Tensor, dtype: torch.dtype) -> Any:
        """Return what all layers with this mixer need in a call with tokens at `positions` [b or 1,
        t]; they find it in `step.shared`. `dtype` is that of states."""
        return None

    @staticmethod
    def new_cache() -> CacheSlot:
        """Return an empty cache for one layer."""
        raise NotImplementedError

    def forward(self, x: Tensor, step: Step, slot: Any) -> Tensor:
        """x [b, t, H] -> [b, t, H]; `slot` is what `new_cache` gave, None without a cache."""
        raise NotImplementedError

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [b, t, H] -> q [b, h, t, d], k and v [b, g, t, d]; q and k normalised per head."""
        return self.split(self.q_proj(x), self.k_proj(x), self.v_proj(x))

    def split(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split projections [b, t, h * d] into heads [b, h, t, d]; q and k normalised per head."""
        q, k, v = (y.unflatten(-1, (-1, self.config.head_dim)) for y in (q, k, v))
        return self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)

    def merge(self, o: Tensor, x: Tensor) -> Tensor:
        """o [b, t, h * d], gated by a projection of x, -> [b, t, H]."""
        return self.o_proj(o * torch.sigmoid(getattr(self, str(self.gate_name))(x)))


def by_name(*mixers: type[HypeNetMixer]) -> dict[str, type[HypeNetMixer]]:
    """Return mixers by every entry of `mixer_types` that stands for one."""
    return {name: mixer for mixer in mixers for name in mixer.hf_names}
