"""Learning rate as a pure function of the step, and AdamW over what a stage trains."""

from __future__ import annotations

import math

import torch
from torch import nn

from megatron_hypenet.config.schema import StageConfig

ADAM_EPSILON = 1e-8


def lr_at(step: int, config: StageConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    Linear from lr / warmup_iters to lr over the warm-up, then constant, or a half cosine that
    reaches min_lr at the last step.
    """
    if step < config.warmup_iters:
        return config.lr * (step + 1) / config.warmup_iters
    if config.lr_schedule == "constant":
        return config.lr
    remaining = max(config.train_iters - 1 - config.warmup_iters, 1)
    progress = min((step - config.warmup_iters) / remaining, 1.0)
    return config.lr - (config.lr - config.min_lr) * 0.5 * (1.0 - math.cos(math.pi * progress))


def adamw(parameters: dict[str, nn.Parameter], config: StageConfig) -> torch.optim.AdamW:
    """Fused AdamW over named parameters; weight decay, if any, does not apply to vectors (norm
    weights)."""
    groups = [{"params": list(parameters.values()), "weight_decay": config.weight_decay}]
    if config.weight_decay > 0:
        matrices = [parameter for parameter in parameters.values() if parameter.dim() > 1]
        vectors = [parameter for parameter in parameters.values() if parameter.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=config.adam_betas, eps=ADAM_EPSILON, fused=True
    )
