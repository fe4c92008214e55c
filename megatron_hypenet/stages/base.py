"""What a training stage promises the engine: what trains, what the loss is, and what is handed on under which names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megatron_hypenet.config.model import ModelConfig

Batch = Mapping[str, Tensor]
"""One micro-batch: `tokens` [b, t + 1], int64, from data.blend."""


class StageModule(nn.Module, ABC):
    """The module the engine wraps. Its parameters are exactly what trains; a frozen teacher hangs beside it, unregistered.

    Keeping the teacher out of `modules()` keeps it out of the optimizer, the gradient norm, dtype casts and every checkpoint.
    """

    name: ClassVar[str]
    """The stage's name in configs, folders and metric tags."""

    def __init__(self, model_config: ModelConfig) -> None:
        super().__init__()
        self.model_config = model_config
        """Shape of the student that this stage hands on."""

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """One micro-batch -> (loss, metrics).

        The loss is a scalar in fp32 (fp64 for fp64 models), a mean over this process's tokens and already summed over tensor-parallel
        ranks; metrics are detached scalars of the same kind, by TensorBoard tag.
        """

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer gets, by local parameter name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    @abstractmethod
    def sharded_state_dict(self, prefix: str = "") -> dict[str, Any]:
        """Megatron sharded tensors of what this stage hands on, under the student's final names."""

    def attach_frozen(self, name: str, module: nn.Module) -> None:
        """Hang a frozen module beside the stage as attribute `name`, without registering it."""
        module.requires_grad_(False)
        module.eval()
        self.__dict__[name] = module


def inputs_and_labels(batch: Batch) -> tuple[Tensor, Tensor]:
    """Split `tokens` [b, t + 1] into the inputs [b, t] and the tokens [b, t] that follow them."""
    tokens = batch["tokens"]
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which sums over tokens are kept: fp32, or fp64 for fp64 models."""
    return torch.float64 if dtype == torch.float64 else torch.float32
