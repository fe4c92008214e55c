"""Attention weights for an RNN mixer: the tensor algebra of HALO's first step (arXiv 2601.22156), and reproducible fresh weights."""

import hashlib

import torch
from torch import Tensor


def repeat_groups(weight: Tensor, head_dim: int, heads_per_group: int) -> Tensor:
    """Give every query head its own copy of its group's key or value rows: [groups * head_dim, h] -> [heads * head_dim, h].

    Copies are adjacent (repeat-interleave), because query heads of one group are adjacent."""
    heads = weight.unflatten(0, (-1, head_dim))
    return heads.repeat_interleave(heads_per_group, dim=0).flatten(0, 1)


def named_normal(key: str, shape: tuple[int, ...], *, std: float, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor from N(0, std^2) that depends on its global name, shape and the seed alone: equal on every layout and in every order.

    Drawn on the CPU in fp32, then cast."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return (torch.randn(shape, generator=generator) * std).to(dtype)
