"""What the layers of a model are built from: Megatron's parallel linear layers and this package's
attention, or Transformer Engine's.

The one place that imports Megatron's wrappers of Transformer Engine, and only when a model asks for
them: importing it takes seconds and a GPU's libraries. Both kinds of linear layer have one
parameter, `weight`, of the same shape, so checkpoints do not depend on the choice. Norms stay
modules of their own: Transformer Engine's fused LayerNormLinear would move their weights to other
names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules

from megatron_hypenet.config.computation import TransformerImpl


@dataclass
class MixerSubmodules:
    """What a mixer is built from."""

    linear_in: Any = ColumnParallelLinear
    linear_proj: Any = RowParallelLinear
    core_attention: Any = None
    """Megatron's class for attention over whole sequences; None: this package's operation."""


def mixer_submodules(impl: TransformerImpl) -> MixerSubmodules:
    """Return the parts of a mixer in this implementation."""
    if impl == "local":
        return MixerSubmodules()
    from megatron.core.extensions import transformer_engine as theirs

    return MixerSubmodules(
        linear_in=theirs.TEColumnParallelLinear,
        linear_proj=theirs.TERowParallelLinear,
        core_attention=theirs.TEDotProductAttention,
    )


def mlp_submodules(impl: TransformerImpl) -> MLPSubmodules:
    """Return the parts of an MLP in this implementation."""
    parts = mixer_submodules(impl)
    return MLPSubmodules(linear_fc1=parts.linear_in, linear_fc2=parts.linear_proj)


def save_original_inputs(*linears: Any) -> None:
    """Let Transformer Engine's layers keep their inputs for backward as they are, not quantised:
    inputs that are dropped and recomputed would otherwise be kept all the same."""
    from megatron.core.extensions.transformer_engine import set_save_original_input

    for linear in linears:
        set_save_original_input(linear)
