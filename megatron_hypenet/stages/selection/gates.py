"""Learn one gate per layer between attention and its aligned RNN mixer, all layers at once, with
all weights frozen (after FlashMorph, arXiv 2606.30562; details are this project's own).

Gates g_l in (0, 1) minimise KL(teacher || gated model) on recall documents, at their answers, and
on text, under the budget sum_l g_l = K: exactly the wanted number of attention layers. Because all
gates move at once, a layer's gate answers for what the others lose: two layers that do the same
work need not both be kept, which scores of one layer at a time cannot see.

The update is mirror descent on that set with the binary entropy:

    a <- a - lr * m / sqrt(v)        g_l = sigmoid(a_l - tau), tau such that sum_l g_l = K

m and v are averages of the gradient by g, without its mean over layers, which the budget takes
away, and of its mean square over layers. One scale v serves all layers: a scale for each, as Adam
has, would make a layer that hardly matters move as far as one that does. The gradient is that by g,
not by a, so a gate near 0 or 1 still moves. Gates of the end are the scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.selection import SelectConfig
from megatron_hypenet.errors import DivergedError
from megatron_hypenet.model.flops import forward_flops, mixer_flops
from megatron_hypenet.stages.selection.method import (
    TRAINING,
    Content,
    LayerScores,
    RankSettings,
    SelectionMethod,
    SelectionWork,
    register_method,
)

PASSES = 2
"""Models that read each token: the teacher, and the gated model."""
MOMENTUM, SQUARE_DECAY = 0.9, 0.95
"""Weights of the past in m and v; the stages' AdamW has the same."""
TINY = 1e-30
"""Keeps the quotient finite where no gate has a gradient."""


@dataclass(frozen=True, slots=True)
class GateState:
    """Gates after some steps; as JSON in an unfinished scores file."""

    logits: tuple[float, ...]
    momentum: tuple[float, ...]
    square: float = 0.0
    losses: tuple[float, ...] = ()
    """The KL of every step so far, in nats."""

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> GateState:
        """Return the state that an unfinished scores file holds."""
        return cls(
            logits=tuple(content["logits"]),
            momentum=tuple(content["momentum"]),
            square=content["square"],
            losses=tuple(content["losses"]),
        )

    def moved(self, loss: float, gradient: Sequence[float], lr: float) -> GateState:
        """Return the state after a step with this loss and gradient by the gates."""
        mean = sum(gradient) / len(gradient)
        centred = [value - mean for value in gradient]
        momentum = [
            MOMENTUM * before + (1 - MOMENTUM) * value
            for before, value in zip(self.momentum, centred, strict=True)
        ]
        size = sum(value * value for value in centred) / len(centred)
        square = SQUARE_DECAY * self.square + (1 - SQUARE_DECAY) * size
        step = len(self.losses) + 1
        # the averages begin at 0, as Adam's do
        scale = math.sqrt(square / (1 - SQUARE_DECAY**step)) * (1 - MOMENTUM**step)
        return GateState(
            logits=tuple(
                logit - lr * value / (scale + TINY)
                for logit, value in zip(self.logits, momentum, strict=True)
            ),
            momentum=tuple(momentum),
            square=square,
            losses=(*self.losses, loss),
        )


@register_method
class GatesMethod(SelectionMethod):
    """Gates of all layers, learned together."""

    name = "gates"
    metrics = ("gate",)
    reads = frozenset({TRAINING})
    about = (
        "A gate in every layer mixed attention and its aligned RNN mixer; all gates were learned "
        "together, under a budget of as many attention layers as are kept. The value is the share "
        "of attention in the end."
    )
    axis = "share of attention"

    def measure(self, work: SelectionWork) -> Content:
        """Learn the gates; an interrupted attempt goes on with the step that it was at, and on the
        same layout comes to the same gates."""
        budget = {"num_attention_layers": work.num_attention}
        if work.num_attention == work.num_layers:
            return self._content([1.0] * work.num_layers) | budget | {"tokens": 0, "losses": []}
        state = self._learned(work)
        settings = work.settings.gates
        tokens = PASSES * settings.train_iters * settings.global_batch_size
        return {
            **self._content(within_budget(state.logits, work.num_attention)),
            **budget,
            "tokens": tokens * work.settings.seq_length,
            "losses": list(state.losses),
        }

    @staticmethod
    def _content(gates: Sequence[float]) -> Content:
        return {"layers": {str(layer): {"gate": gate} for layer, gate in enumerate(gates)}}

    @staticmethod
    def _learned(work: SelectionWork) -> GateState:
        """Return the state after the last step."""
        from megatron_hypenet.parallel.agreement import from_first
        from megatron_hypenet.stages.selection.comparison import Rows
        from megatron_hypenet.stages.selection.gated_layers import GatedModel

        model = GatedModel(*work.models())
        samples = work.samples()
        settings = work.settings.gates
        zeros = (0.0,) * work.num_layers
        state = GateState(logits=zeros, momentum=zeros)
        if "partial" in work.known:
            state = GateState.of_json(work.known["partial"])
        count = settings.global_batch_size
        while (step := len(state.losses)) < settings.train_iters:
            place = (step * count, count, work.settings.seq_length)
            rows = Rows(
                samples.batch(*place)[:, :-1],
                samples.predicted(*place),
                settings.micro_batch_size,
            )
            gates = within_budget(state.logits, work.num_attention)
            # all ranks go on with the same bits
            loss, gradient = from_first(model.loss_and_gradient(gates, rows))
            if not all(map(math.isfinite, (loss, *gradient))):
                raise DivergedError(
                    f"select.method=gates: the loss of step {step + 1} is {loss}, or its gradient "
                    "is not finite; the weights are not trained here, so look at the teacher and "
                    "at stage 1, or use precision=float32"
                )
            state = state.moved(loss, gradient, settings.lr)
            work.save({"partial": asdict(state)})
            work.progress(step + 1, settings.train_iters)
        return state

    def importance(self, scores: LayerScores, settings: RankSettings) -> tuple[float, ...]:
        """Return the gates."""
        return scores.values["gate"]

    def flops(self, settings: SelectConfig, teacher: ModelConfig, converted: ModelConfig) -> float:
        """Count a forward pass of the teacher, and one forward and one backward of the gated model,
        whose backward computes no gradients of weights."""
        length = settings.seq_length
        alone = forward_flops(teacher, length)
        gated = alone + sum(mixer_flops(converted, length))
        gates = settings.gates
        return gates.train_iters * gates.global_batch_size * length * (alone + 2 * gated)


def within_budget(logits: Sequence[float], budget: int) -> list[float]:
    """Return gates sigmoid(a - tau) with the one tau for which they sum to `budget`, which is above
    0 and below the number of gates; found by halving, to the last bits."""
    assert 0 < budget < len(logits), "the budget lies between no gate and all"
    low, high = min(logits) - _FAR, max(logits) + _FAR
    while low < (middle := (low + high) / 2) < high:
        if sum(_sigmoid(logit - middle) for logit in logits) > budget:
            low = middle
        else:
            high = middle
    return [_sigmoid(logit - high) for logit in logits]


_FAR = 50.0
"""A sigmoid so far from 0 is 0 or 1 to the last bits, up to 1e-21."""


def _sigmoid(x: float) -> float:
    # exp of a negative number alone: it cannot overflow
    return math.exp(x) / (1.0 + math.exp(x)) if x < 0 else 1.0 / (1.0 + math.exp(-x))
