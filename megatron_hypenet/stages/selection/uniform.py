"""Evenly spaced layers keep attention: nothing is measured.

Of K attention layers among L the i-th, from 0, is floor((2 i + 1) L / (2 K)): the middle of the
i-th of K equal stretches, so that neither end of the model is favoured.
"""

from __future__ import annotations

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.selection import SelectConfig
from megatron_hypenet.stages.selection.method import (
    Content,
    LayerScores,
    RankSettings,
    SelectionMethod,
    SelectionWork,
    register_method,
)


@register_method
class UniformMethod(SelectionMethod):
    """The same distance between attention layers, whatever they do."""

    name = "uniform"
    metrics = ()
    about = (
        "Layers at even distances keep softmax attention (value 1); nothing was measured to choose "
        "them."
    )
    axis = "keeps attention"

    def measure(self, work: SelectionWork) -> Content:
        """Return a scores file with an empty entry for every layer, without reading a token."""
        return {"layers": {str(layer): {} for layer in range(work.num_layers)}, "tokens": 0}

    def importance(self, scores: LayerScores, settings: RankSettings) -> tuple[float, ...]:
        """Return 1 for the layers that keep attention and 0 for the others."""
        kept = evenly_spaced(settings.num_attention, scores.num_layers)
        return tuple(float(layer in kept) for layer in range(scores.num_layers))

    def flops(self, settings: SelectConfig, teacher: ModelConfig, converted: ModelConfig) -> float:
        """Return 0: no model runs."""
        return 0.0


def evenly_spaced(count: int, num_layers: int) -> frozenset[int]:
    """Return `count` of `num_layers` layers, each in the middle of one of `count` equal
    stretches."""
    return frozenset((2 * place + 1) * num_layers // (2 * count) for place in range(count))
