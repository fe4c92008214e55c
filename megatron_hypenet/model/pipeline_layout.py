"""How many layers each pipeline stage holds: as configured, or balanced by what each layer costs.

Layers differ (softmax attention grows with the sequence, the RNN mixer does not) and the head costs
as much as several layers on the last stage, so equal counts would make stages wait. Costs are FLOPs
per token (model/flops.py); only their ratios matter."""

from collections.abc import Sequence
from itertools import accumulate

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.errors import LayoutError
from megatron_hypenet.model.flops import head_flops, mixer_flops, mlp_flops

DEFAULT_SEQ_LENGTH = 4096
"""Sequence length for the costs of layers when a model is built outside a training stage."""


def layer_costs(model: ModelConfig, seq_length: int) -> list[float]:
    """Forward FLOPs per token of every layer, mixer and MLP."""
    return [mixer + mlp_flops(model) for mixer in mixer_flops(model, seq_length)]


def balanced_layout(
    costs: Sequence[float], num_stages: int, *, head: float = 0.0
) -> tuple[int, ...]:
    """Return layers per stage, in order and at least one each, that minimise the load of the most
    loaded stage; `head` counts on the last.

    Exact, by dynamic programming over (stages, layers). Among equally good layouts the one with
    more layers on earlier stages wins. Raises LayoutError when there are fewer layers than
    stages."""
    count = len(costs)
    if not 1 <= num_stages <= count:
        raise LayoutError(
            f"{count} layers cannot fill {num_stages} pipeline stages; use a pipeline size from 1 "
            f"to {count}"
        )
    before = [0.0, *accumulate(costs)]
    # best[n]: least possible load of the most loaded stage when the first stages hold n layers;
    # cut[s][n]: layers before the last of them
    best = {n: before[n] for n in range(1, count + 1)}
    cuts: list[dict[int, int]] = []
    for stage in range(1, num_stages):
        extra = head if stage == num_stages - 1 else 0.0
        row: dict[int, float] = {}
        cut: dict[int, int] = {}
        for n in range(stage + 1, count + 1):
            loads = {m: max(best[m], before[n] - before[m] + extra) for m in range(stage, n)}
            cut[n] = max(loads, key=lambda m: (-loads[m], m))
            row[n] = loads[cut[n]]
        best = row
        cuts.append(cut)
    ends = [count]
    for cut in reversed(cuts):
        ends.append(cut[ends[-1]])
    ends.append(0)
    return tuple(ends[i] - ends[i + 1] for i in reversed(range(num_stages)))


def pipeline_layout(
    model: ModelConfig, parallel: ParallelConfig, *, seq_length: int = DEFAULT_SEQ_LENGTH
) -> tuple[int, ...]:
    """Return layers per stage of one model on one layout: `parallel.pipeline_layout`, else
    balanced. Raises LayoutError."""
    stages = parallel.pipeline_model_parallel_size
    asked = parallel.pipeline_layout
    if asked is None:
        return balanced_layout(layer_costs(model, seq_length), stages, head=head_flops(model))
    if len(asked) != stages or sum(asked) != model.num_layers:
        raise LayoutError(
            f"parallel.pipeline_layout={list(asked)} places {sum(asked)} layers on {len(asked)} "
            f"stages; the model has {model.num_layers} "
            f"layers and parallel.pipeline_model_parallel_size={stages}. "
            f"Give {stages} numbers that add up, or null to balance by cost"
        )
    return asked


def layers_of_stage(layout: Sequence[int], stage: int) -> range:
    """Return the global indices of the layers on one stage."""
    first = sum(layout[:stage])
    return range(first, first + layout[stage])
