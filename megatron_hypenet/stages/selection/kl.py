"""Rank layers by the KL divergence that converting one of them causes on text.

Every layer is replaced by its aligned RNN mixer, one at a time. Its importance is the KL(teacher ||
teacher with that layer converted) of next-token distributions, a mean over the tokens of held-out
text: the loss that stage 2 would begin with if that were its student. The teacher's final hidden
states are computed once for all layers.
"""

from __future__ import annotations

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.selection import SelectConfig
from megatron_hypenet.model.flops import forward_flops
from megatron_hypenet.stages.selection.method import (
    HELDOUT,
    Content,
    LayerScores,
    RankSettings,
    SelectionMethod,
    SelectionWork,
    register_method,
)


@register_method
class KLMethod(SelectionMethod):
    """KL of the model with one layer converted."""

    name = "kl"
    metrics = ("kl",)
    reads = frozenset({HELDOUT})
    about = (
        "Each layer's attention was replaced alone by its aligned RNN mixer: the importance is the "
        "KL divergence from the teacher's next-token distribution that this causes on held-out "
        "text. The layers with the largest values keep softmax attention."
    )
    axis = "KL divergence in nats per token"

    def measure(self, work: SelectionWork) -> Content:
        """Take the text a part at a time, every layer on each; an interrupted attempt goes on with
        the part that it was at."""
        import torch

        from megatron_hypenet.stages.selection.comparison import Comparison, Rows
        from megatron_hypenet.stages.selection.layer_sweep import swapped

        teacher, mixers = work.models()
        comparison = Comparison(teacher)
        texts = work.heldout()[:, :-1]
        total = len(texts) * work.num_layers
        size = comparison.rows_at_once(work.settings.batch_size)
        partial = work.known.get("partial", {"sequences": 0, "sums": [0.0] * work.num_layers})
        done, sums = partial["sequences"], list(partial["sums"])
        while done < len(texts):
            part = texts[done : done + size]
            rows = Rows(part, torch.ones_like(part, dtype=torch.bool), work.settings.batch_size)
            reference = comparison.reference(rows)
            for layer in range(work.num_layers):
                with swapped(teacher, layer, mixers):
                    sums[layer] += comparison.kl(reference)
                work.progress(done * work.num_layers + (layer + 1) * len(part), total)
            done += len(part)
            work.save({"partial": {"sequences": done, "sums": sums}})
        return {
            "layers": {str(layer): {"kl": kl / len(texts)} for layer, kl in enumerate(sums)},
            "tokens": (work.num_layers + 1) * texts.numel(),
        }

    def importance(self, scores: LayerScores, settings: RankSettings) -> tuple[float, ...]:
        """Return the divergences."""
        return scores.values["kl"]

    def flops(self, settings: SelectConfig, teacher: ModelConfig, converted: ModelConfig) -> float:
        """Count the forward passes of as many models as layers, and of the teacher."""
        tokens = (teacher.num_layers + 1) * settings.heldout_sequences * settings.seq_length
        return tokens * forward_flops(teacher, settings.seq_length)
