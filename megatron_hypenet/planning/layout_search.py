"""Find layouts whose training stages fit a GPU's memory, those that are estimated fastest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from megatron_hypenet.config.checks import layout_problems
from megatron_hypenet.config.layout import (
    CONTEXT,
    OFFLOAD,
    PIPELINE,
    PIPELINE_LAYOUT,
    SEQUENCE,
    TENSOR,
    VIRTUAL,
    ZERO,
    Change,
    Layout,
)
from megatron_hypenet.config.mixers import MixerSpec
from megatron_hypenet.config.mixers.softmax_attn import ATTENTION
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import STAGES, HeadStageConfig, RunConfig
from megatron_hypenet.planning.machine import Machine
from megatron_hypenet.planning.memory import StageMemory, stage_memory
from megatron_hypenet.planning.step_time import StepTime, step_time
from megatron_hypenet.stages.spec import stage_spec

SIZES = (1, 2, 4, 8)
"""Sizes of tensor, pipeline and context parallelism that are tried."""
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True, slots=True)
class StageNeed:
    """The need of one training stage on the pipeline stage that needs most."""

    stage: str
    pipeline_stage: int
    memory: StageMemory


@dataclass(frozen=True, slots=True)
class Fit:
    """A layout that fits, as settings, with the need of its fullest training stage."""

    change: Change
    fullest: StageNeed
    hours: float
    """Estimated hours of the training stages."""


def teacher_and_student(shape: ModelConfig, spec: MixerSpec) -> tuple[ModelConfig, ModelConfig]:
    """Return both models of a run from the shape of one of them. It matters little which layers
    will keep softmax attention: from a teacher's shape it takes every fourth, with the RNN mixer
    `spec` in the others."""
    everywhere = (ATTENTION,) * shape.num_layers
    teacher = shape.replace(
        mixer_types=everywhere, mixers={}, attn_use_rope=True, attn_use_output_gate=False
    )
    if not shape.is_teacher:
        return teacher, shape
    kinds = (ATTENTION if layer % 4 == 3 else spec.name for layer in range(shape.num_layers))
    return teacher, teacher.with_mixers(kinds, (spec,))


def needs(layout: Layout) -> list[StageNeed]:
    """Return the need of each training stage of a valid layout with a model."""
    assert layout.model is not None and layout.dp_size is not None, (
        "asked for valid layouts of a known model"
    )
    spec = layout.run.align.spec
    teacher, student = teacher_and_student(layout.model, spec)
    found = []
    for name in layout.stages:
        trained = stage_spec(name).student_shape(teacher, student, spec)
        parts = stage_memory(
            name,
            teacher,
            trained,
            layout.run.stage(name),
            layout.parallel,
            data_ranks=layout.dp_size,
            fp8=layout.run.fp8,
        )
        index = max(range(len(parts)), key=lambda at: parts[at].needed)
        found.append(StageNeed(name, index, parts[index]))
    return found


def step_times(layout: Layout, machine: Machine) -> dict[str, StepTime]:
    """Return the estimated time of an optimizer step of each training stage of a valid layout with
    a model."""
    assert layout.model is not None and layout.dp_size is not None, (
        "asked for valid layouts of a known model"
    )
    spec = layout.run.align.spec
    teacher, student = teacher_and_student(layout.model, spec)
    return {
        name: step_time(
            name,
            teacher,
            stage_spec(name).student_shape(teacher, student, spec),
            layout.run.stage(name),
            layout.parallel,
            data_ranks=layout.dp_size,
            machine=machine,
        )
        for name in layout.stages
    }


def fullest(found: Sequence[StageNeed]) -> StageNeed:
    """Return the stage that needs most."""
    return max(found, key=lambda need: need.memory.needed)


def fits(layout: Layout, gpu_bytes: float, machine: Machine) -> list[Fit]:
    """Return every layout on these processes that obeys the rules and fits, the one whose training
    stages are estimated to end first before the others."""
    found = []
    for change in _candidates(layout):
        changed = layout.changed(change)
        if layout_problems(changed):
            continue
        need = fullest(needs(changed))
        if need.memory.needed > gpu_bytes:
            continue
        times = step_times(changed, machine)
        seconds = sum(
            changed.run.stage(name).train_iters * time.total for name, time in times.items()
        )
        found.append(Fit(change, need, seconds / 3600))
    return sorted(found, key=lambda fit: (fit.hours, fit.change[ZERO]))


def scaled_batches(layout: Layout) -> Layout:
    """Return the run with batches that give every GPU a micro-batch, and as many fewer steps; a
    stage whose batch is large enough stays as it is."""
    change: dict[str, object] = {}
    for name in layout.stages:
        stage = layout.run.stage(name)
        size = layout.processes * stage.micro_batch_size
        if size > stage.global_batch_size:
            sequences = stage.train_iters * stage.global_batch_size
            change[f"{name}.global_batch_size"] = size
            change[f"{name}.train_iters"] = max(1, round(sequences / size))
    return layout.changed(change)


def _candidates(layout: Layout) -> Iterator[Change]:
    processes = layout.processes
    chunks = layout.parallel.virtual_pipeline_model_parallel_size
    for tensor, pipeline, context in product(SIZES, repeat=3):
        if processes % (tensor * pipeline * context):
            continue
        for zero, recompute in product((1, 2, 3), RECOMPUTE):
            if zero > 1 and pipeline > 1:
                continue
            yield {
                TENSOR: tensor,
                PIPELINE: pipeline,
                VIRTUAL: chunks if pipeline > 1 else 1,
                CONTEXT: context,
                SEQUENCE: tensor > 1,
                PIPELINE_LAYOUT: None,
                ZERO: zero,
                OFFLOAD: False,
                **{f"{stage}.recompute": recompute for stage in _head_stages(layout.run)},
            }


def _head_stages(run: RunConfig) -> dict[str, HeadStageConfig]:
    """Return the training stages that can recompute activations."""
    stages = {name: run.stage(name) for name in STAGES}
    return {name: stage for name, stage in stages.items() if isinstance(stage, HeadStageConfig)}
