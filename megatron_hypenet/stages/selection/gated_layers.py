"""A model between its teacher and the student: in every layer a gate g mixes attention and the
aligned RNN mixer, g * attention + (1 - g) * mixer, and all weights are frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor, nn

from megatron_hypenet.model.hypenet import HypeNetModel
from megatron_hypenet.parallel.cpu import device
from megatron_hypenet.stages.aligned_mixers import AlignedMixers
from megatron_hypenet.stages.selection.comparison import Comparison, Rows


class GatedLayer(nn.Module):
    """Replaces a layer's attention by a mixture of it and of the RNN mixer."""

    gate: Tensor | None = None
    """The attention's share, a scalar; None for attention alone, without the RNN mixer's work."""

    def __init__(self, attention: nn.Module, mixer: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.mixer = mixer

    def forward(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Take Megatron's call of a mixer: hidden_states [s, b, h] -> (output [s, b, h], bias), in
        the dtype of the model."""
        output, bias = self.attention(hidden_states, *args, **kwargs)
        if self.gate is None:
            return output, bias
        other, _ = self.mixer(hidden_states, *args, **kwargs)
        return other + self.gate * (output - other), bias


class GatedModel:
    """The teacher with a gate in each layer: KL from the teacher itself, and its gradient by the
    gates, on any parallel layout."""

    def __init__(self, teacher: HypeNetModel, mixers: AlignedMixers) -> None:
        """`teacher` is changed in place, for good."""
        self.num_layers = teacher.model_config.num_layers
        self.layers = {
            layer: GatedLayer(teacher.mixer(layer), mixer) for layer, mixer in mixers.items()
        }
        for layer, gated in self.layers.items():
            teacher.set_mixer(layer, gated)
        self.comparison = Comparison(teacher)

    def loss_and_gradient(self, gates: Sequence[float], rows: Rows) -> tuple[float, list[float]]:
        """Return KL(teacher || gated model), a mean over rows of each one's mean over the positions
        that count, and its gradient by the gate of every layer; in float64 on every rank. Work and
        memory are those of a forward pass of the teacher, and a forward and backward pass of both
        mixers in every layer."""
        reference = self.comparison.reference(rows)
        leaf = torch.tensor(gates, dtype=torch.float64, device=device(), requires_grad=True)
        try:
            for layer, gated in self.layers.items():
                gated.gate = leaf[layer]
            total = self.comparison.kl(reference, train=True)
        finally:
            for gated in self.layers.values():
                gated.gate = None
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        if self.comparison.model.config.sequence_parallel:
            # each rank has the part of its own tokens
            gradient = reduce_from_tensor_model_parallel_region(gradient)
        gradient = self.comparison.over_ranks(gradient)
        count = len(rows.tokens)
        return total / count, [value / count for value in gradient.tolist()]
