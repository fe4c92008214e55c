"""How long the stages of a pipeline take for a step by Megatron's 1F1B schedules, found by
following them pass by pass.

With several chunks per stage (interleaved 1F1B) chunk k lies on stage k mod stages. A stage then
sends as many micro-batches as there are stages through one of its chunks before it turns to the
next, and its passes forward and backward alternate once it has begun enough of them."""

from __future__ import annotations

from collections.abc import Sequence

BACKWARD = 2.0
"""Time of a backward pass in forward passes."""

Pass = tuple[bool, int, int]
"""Whether a pass goes forward, its micro-batch, and its chunk among those of its stage."""


def passes_of_stage(
    stage: int, num_stages: int, chunks_per_stage: int, micro_batches: int
) -> list[Pass]:
    """Return what a stage computes in a training step, in order.

    Several chunks per stage need micro-batches in multiples of the stages."""
    size = num_stages if chunks_per_stage > 1 else micro_batches
    turns = [
        (micro_batch, chunk)
        for first in range(0, micro_batches, size)
        for chunk in range(chunks_per_stage)
        for micro_batch in range(first, first + size)
    ]
    ahead = num_stages - stage - 1
    if chunks_per_stage > 1:
        ahead = 2 * ahead + (chunks_per_stage - 1) * num_stages
    ahead = min(ahead, len(turns))
    found = []
    for position in range(len(turns) + ahead):
        if position < len(turns):
            found.append((True, *turns[position]))
        if position >= ahead:
            micro_batch, chunk = turns[position - ahead]
            found.append((False, micro_batch, chunks_per_stage - 1 - chunk))
    return found


def step_length(times: Sequence[float], num_stages: int, micro_batches: int) -> float:
    """Return how long a training step takes, of which a micro-batch takes `times[k]` in chunk k,
    forward and backward; sending takes no time."""
    last = len(times) - 1
    waiting = [
        passes_of_stage(stage, num_stages, len(times) // num_stages, micro_batches)[::-1]
        for stage in range(num_stages)
    ]
    free = [0.0] * num_stages
    ends: dict[tuple[bool, int, int], float] = {}
    while any(waiting):
        for stage, passes in enumerate(waiting):
            while passes:
                forward, micro_batch, own = passes[-1]
                chunk = own * num_stages + stage
                if forward:
                    needs = (True, micro_batch, chunk - 1) if chunk else None
                else:
                    needs = (chunk == last, micro_batch, min(chunk + 1, last))
                if needs is not None and needs not in ends:
                    break
                passes.pop()
                begin = max(free[stage], 0.0 if needs is None else ends[needs])
                share = (1.0 if forward else BACKWARD) / (1.0 + BACKWARD)
                free[stage] = begin + share * times[chunk]
                ends[forward, micro_batch, chunk] = free[stage]
    return max(free)
