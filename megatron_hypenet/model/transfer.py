"""Attention weights for an RNN mixer: the tensor algebra of HALO's first step (arXiv 2601.22156),
and reproducible fresh weights."""

import hashlib

import torch
from torch import Tensor

from megatron_hypenet.config.mixers import Init, ParamSpec


def repeat_groups(weight: Tensor, head_dim: int, heads_per_group: int) -> Tensor:
    """Give every query head its own copy of its group's key or value rows: [groups * head_dim, h]
    -> [heads * head_dim, h].

    Copies are adjacent (repeat-interleave), because query heads of one group are adjacent."""
    heads = weight.unflatten(0, (-1, head_dim))
    return heads.repeat_interleave(heads_per_group, dim=0).flatten(0, 1)


def fresh_parameter(
    key: str, parameter: ParamSpec, *, seed: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return a tensor of the parameter's whole shape, drawn as its specification says. It depends
    on its global name `key` and on the seed alone, so it is equal on every layout and in every
    order of creation. It is drawn on the CPU in fp32, then cast."""
    return draw(parameter.init, parameter.shape, _generator(key, seed)).to(dtype)


def named_normal(
    key: str, shape: tuple[int, ...], *, std: float, seed: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return a tensor from N(0, std^2), drawn in the same way by its name."""
    return draw(Init("normal", 0.0, std), shape, _generator(key, seed)).to(dtype)


def _generator(key: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw(init: Init, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw an fp32 tensor of the distribution on the CPU. Inverse softplus is x + log(1 - exp(-x)),
    and "log" the logarithm of what was drawn."""
    if init.distribution == "constant":
        drawn = torch.full(shape, init.first)
    elif init.distribution == "normal":
        drawn = torch.randn(shape, generator=generator) * init.second + init.first
    else:
        low, high = (torch.tensor(bound) for bound in (init.first, init.second))
        if init.distribution == "log_uniform":
            low, high = low.log(), high.log()
        drawn = torch.rand(shape, generator=generator) * (high - low) + low
        if init.distribution == "log_uniform":
            drawn = drawn.exp()
    if init.then == "log":
        return drawn.log()
    if init.then == "inverse_softplus":
        return drawn + torch.log(-torch.expm1(-drawn))
    return drawn
