"""How many layers each pipeline stage holds, or each of its chunks: as configured, or balanced by
what each layer costs.

Layers differ (softmax attention grows with the sequence, the RNN mixer does not) and the head costs
as much as several layers on the last stage, so equal counts would make stages wait. Costs are FLOPs
per token (model/flops.py); only their ratios matter.

A layout names the layers of every chunk in order of the layers. Where each of p stages has several
chunks, chunk k lies on stage k mod p: every stage holds one chunk of each round of p chunks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.errors import LayoutError
from megatron_hypenet.model.flops import head_flops, mixer_flops, mlp_flops
from megatron_hypenet.model.pipeline_schedule import step_length

DEFAULT_SEQ_LENGTH = 4096
"""Sequence length for the costs of layers when a model is built outside a training stage."""
ROUND_WEIGHTS = (2, 3)
"""Powers of the rounds' loads that `balanced_layout` tries to minimise the sum of."""
MICRO_BATCHES = 4
"""Micro-batches per stage for which it compares what it has found."""


def layer_costs(model: ModelConfig, seq_length: int) -> list[float]:
    """Forward FLOPs per token of every layer, mixer and MLP."""
    return [mixer + mlp_flops(model) for mixer in mixer_flops(model, seq_length)]


def balanced_layout(
    costs: Sequence[float], num_stages: int, *, chunks_per_stage: int = 1, head: float = 0.0
) -> tuple[int, ...]:
    """Return layers per chunk, in order and at least one each; `head` counts on the last.

    With one chunk per stage the load of the most loaded stage is the least possible, and among
    equally good layouts the one with more layers on earlier stages wins. With several, a round
    takes as long as its most loaded chunk, and unequal rounds make stages wait for each other: it
    is the layout with the shortest step (`step_length`) among the one that balances all chunks,
    and those with the least sum of powers of the rounds' times. Raises LayoutError when there are
    fewer layers than chunks."""
    count = len(costs)
    chunks = num_stages * chunks_per_stage
    if not 1 <= chunks <= count:
        raise LayoutError(
            f"{count} layers cannot fill {_filled(num_stages, chunks_per_stage)}; use "
            + (
                f"a pipeline size from 1 to {count}"
                if chunks_per_stage == 1
                else f"at most {count} chunks together"
            )
        )
    return _balanced(tuple(costs), num_stages, chunks_per_stage, head)


def _filled(num_stages: int, chunks_per_stage: int) -> str:
    stages = f"{num_stages} pipeline stages"
    return stages if chunks_per_stage == 1 else f"{chunks_per_stage} chunks on each of {stages}"


@lru_cache(maxsize=256)
def _balanced(
    costs: tuple[float, ...], num_stages: int, chunks_per_stage: int, head: float
) -> tuple[int, ...]:
    chunks = num_stages * chunks_per_stage
    even = _Splits(costs, 0, chunks, head).layout(len(costs))
    if chunks_per_stage == 1:
        return even
    found = [
        _by_rounds(costs, num_stages, chunks_per_stage, head, power) for power in ROUND_WEIGHTS
    ]

    def length(layout: tuple[int, ...]) -> float:
        loads = [
            sum(costs[layer] for layer in layers_of_chunk(layout, chunk)) for chunk in range(chunks)
        ]
        loads[-1] += head
        return step_length(loads, num_stages, MICRO_BATCHES * num_stages)

    return min((even, *found), key=length)


class _Splits:
    """Finds the best splits of the layers from `first` on into so many consecutive chunks, for
    every last layer: those whose most loaded chunk has the least load. Exact, by dynamic
    programming over (chunks, layers)."""

    def __init__(self, costs: Sequence[float], first: int, chunks: int, head: float) -> None:
        """Find all of them; `head` is added to the last chunk."""
        count = len(costs)
        before = [0.0, *accumulate(costs)]
        self.first = first
        # the load of the most loaded chunk, by where the last one ends
        self.loads = {n: before[n] - before[first] for n in range(first + 1, count + 1)}
        # for every chunk but the first: where it begins, by where it ends
        self.cuts: list[dict[int, int]] = []
        for chunk in range(1, chunks):
            extra = head if chunk == chunks - 1 else 0.0
            row: dict[int, float] = {}
            cut: dict[int, int] = {}
            for n in range(first + chunk + 1, count + 1):
                loads = {
                    m: max(self.loads[m], before[n] - before[m] + extra)
                    for m in range(first + chunk, n)
                }
                cut[n] = max(loads, key=lambda m: (-loads[m], m))
                row[n] = loads[cut[n]]
            self.loads = row
            self.cuts.append(cut)

    def layout(self, end: int) -> tuple[int, ...]:
        """Return the layers per chunk of the best split that ends there."""
        ends = [end]
        for cut in reversed(self.cuts):
            ends.append(cut[ends[-1]])
        ends.append(self.first)
        return tuple(a - b for a, b in zip(ends, ends[1:], strict=False))[::-1]


def _by_rounds(
    costs: tuple[float, ...], num_stages: int, rounds: int, head: float, power: float
) -> tuple[int, ...]:
    """Return the layout with the least sum of the rounds' times to this power, a round's time being
    the load of its most loaded chunk."""
    count = len(costs)
    total = sum(costs)
    # by number of layers in the rounds so far: the sum, and the layout
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for index in range(rounds):
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for first, (sum_before, layout) in best.items():
            splits = _Splits(costs, first, num_stages, head if index == rounds - 1 else 0.0)
            for end, load in splits.loads.items():
                new = sum_before + (load / total) ** power
                if end not in following or new < following[end][0]:
                    following[end] = (new, layout + splits.layout(end))
        best = following
    return best[count][1]


def pipeline_layout(
    model: ModelConfig, parallel: ParallelConfig, *, seq_length: int = DEFAULT_SEQ_LENGTH
) -> tuple[int, ...]:
    """Return layers per chunk of one model on one layout: `parallel.pipeline_layout`, else
    balanced. Raises LayoutError."""
    asked = parallel.pipeline_layout
    if asked is None:
        return balanced_layout(
            layer_costs(model, seq_length),
            parallel.pipeline_model_parallel_size,
            chunks_per_stage=parallel.virtual_pipeline_model_parallel_size,
            head=head_flops(model),
        )
    chunks = parallel.num_chunks
    if len(asked) != chunks or sum(asked) != model.num_layers:
        interleaved = (
            f" and parallel.virtual_pipeline_model_parallel_size="
            f"{parallel.virtual_pipeline_model_parallel_size}"
        )
        raise LayoutError(
            f"parallel.pipeline_layout={list(asked)} places {sum(asked)} layers on {len(asked)} "
            f"{'chunks' if parallel.interleaved else 'stages'}; the model has {model.num_layers} "
            "layers and "
            f"parallel.pipeline_model_parallel_size={parallel.pipeline_model_parallel_size}"
            f"{interleaved if parallel.interleaved else ''}. "
            f"Give {chunks} numbers that add up, or null to balance by cost"
        )
    return asked


def layers_of_chunk(layout: Sequence[int], chunk: int) -> range:
    """Return the global indices of the layers of one chunk."""
    first = sum(layout[:chunk])
    return range(first, first + layout[chunk])


def chunks_of_stage(layout: Sequence[int], stage: int, num_stages: int) -> list[range]:
    """Return the global indices of the layers of each chunk on one stage, in order."""
    return [layers_of_chunk(layout, chunk) for chunk in range(stage, len(layout), num_stages)]
