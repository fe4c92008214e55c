"""Learning rate as a pure function of the step, and AdamW over what a stage trains."""

from __future__ import annotations

import math

import torch
from torch import nn

from megatron_hypenet.config.schema import StageConfig

ADAM_EPSILON = 1e-8


def lr_at(step: int, config: StageConfig) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    Linear from lr / warmup_iters to lr over the warm-up, then constant, or a half cosine that
    reaches min_lr at the last step, or at step lr_decay_iters and stays there.
    """
    if step < config.warmup_iters:
        return config.lr * (step + 1) / config.warmup_iters
    if config.decay_iters is None:
        return config.lr
    remaining = max(config.decay_iters - 1 - config.warmup_iters, 1)
    progress = min((step - config.warmup_iters) / remaining, 1.0)
    return config.lr - (config.lr - config.min_lr) * 0.5 * (1.0 - math.cos(math.pi * progress))


def adamw(parameters: dict[str, nn.Parameter], config: StageConfig) -> torch.optim.AdamW:
    """Return fused AdamW over named parameters; weight decay, if any, does not apply to vectors
    (norm weights). A group has one dtype: DeepSpeed makes a flat tensor of each."""
    groups: dict[tuple[float, torch.dtype], list[nn.Parameter]] = {}
    for parameter in parameters.values():
        decay = config.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((decay, parameter.dtype), []).append(parameter)
    # matrices before vectors, and the model's dtype before parameters that stay in float32
    ordered = sorted(groups.items(), key=lambda item: (-item[0][0], item[0][1].itemsize))
    return torch.optim.AdamW(
        [{"params": members, "weight_decay": decay} for (decay, _), members in ordered],
        lr=config.lr,
        betas=config.adam_betas,
        eps=ADAM_EPSILON,
        fused=True,
    )
