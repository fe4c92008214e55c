"""How long a run takes on GPUs of a known peak, from its work and the shares of the peak that the
kinds of work were measured to reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_hypenet.config.schema import Recompute
from megatron_hypenet.planning.eta import Planned, use_of

REPEATED: dict[Recompute, float] = {"none": 1.0, "selective": 1.05, "full": 4 / 3}
"""Work of a training step that computes activations again, over one that keeps them: `full` adds a
forward pass to the three of forward and backward, `selective` was measured to add a few percent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hours:
    """The time of one step."""

    step: str
    hours: float
    gpu_hours: float


def hours_of(
    planned: Mapping[str, Planned],
    *,
    gpus: int,
    peak: float,
    recompute: Mapping[str, Recompute] | None = None,
) -> list[Hours]:
    """Return the hours of every step that computes (the others take minutes), on `gpus` with `peak`
    dense bf16 operations per second each; `recompute` is the setting of the stages that have it.

    Evaluations count, saves do not.
    """
    found = []
    for step, work in planned.items():
        if not work.flops:
            continue
        again = REPEATED[(recompute or {}).get(step, "none")]
        flops = again * work.flops + work.evaluations * work.evaluation_flops
        gpu_hours = flops / (peak * use_of(step)) / 3600
        found.append(Hours(step=step, hours=gpu_hours / gpus, gpu_hours=gpu_hours))
    return found
