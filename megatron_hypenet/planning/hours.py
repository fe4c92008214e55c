"""How long a run takes on a layout: training stages by the estimated time of their steps, forward
passes by their work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_hypenet.config.layout import Layout
from megatron_hypenet.config.schema import STAGES
from megatron_hypenet.planning.eta import FORWARD_USE
from megatron_hypenet.planning.layout_search import step_times, teacher_and_student
from megatron_hypenet.planning.machine import Machine
from megatron_hypenet.planning.planned_work import Planned
from megatron_hypenet.planning.step_time import StepTime
from megatron_hypenet.stages.spec import stage_spec

SECONDS_ONLY = ("probe",)
"""Steps that compute for seconds, which no hours are given for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hours:
    """The time of one step of a run."""

    step: str
    hours: float
    gpu_hours: float
    optimizer_step: StepTime | None = None
    """The seconds of one optimizer step of a training stage."""
    tokens_per_second: float = 0.0
    """Tokens per second of one GPU in a training stage."""
    mfu: float = 0.0
    """Share of the GPU's peak that a training stage reaches."""


def hours_of(planned: Mapping[str, Planned], layout: Layout, machine: Machine) -> list[Hours]:
    """Return the hours of every step of a run that computes (the others take minutes), on the GPUs
    of a valid layout with a model.

    Evaluations count, saves do not.
    """
    gpus = layout.processes
    times = step_times(layout, machine)
    assert layout.model is not None, "asked for layouts of a known model"
    spec = layout.run.align.spec
    teacher, student = teacher_and_student(layout.model, spec)
    found = []
    for step, work in planned.items():
        if not work.flops or step in SECONDS_ONLY:
            continue
        forward = work.evaluations * work.evaluation_flops
        if step not in STAGES:
            hours = (work.flops + forward) / (gpus * machine.peak * FORWARD_USE) / 3600
            found.append(Hours(step=step, hours=hours, gpu_hours=gpus * hours))
            continue
        stage = layout.run.stage(step)
        trained = stage_spec(step).student_shape(teacher, student, spec)
        flops = stage_spec(step).flops(stage, teacher, trained) * stage.tokens_per_step
        seconds = times[step].total
        evaluating = forward / (gpus * machine.peak * FORWARD_USE)
        hours = (stage.train_iters * seconds + evaluating) / 3600
        found.append(
            Hours(
                step=step,
                hours=hours,
                gpu_hours=gpus * hours,
                optimizer_step=times[step],
                tokens_per_second=stage.tokens_per_step / seconds / gpus,
                mfu=flops / seconds / gpus / machine.peak,
            )
        )
    return found
