"""The cost model's estimate of a benchmark's case: time of a step, and memory of its first GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_hypenet.config.mixers import MixerSpec
    from megatron_hypenet.config.model import ModelConfig
    from megatron_hypenet.config.schema import ParallelConfig, StageConfig
    from megatron_hypenet.planning.step_time import StepTime

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What `hypenet plan` expects of a step on H100s in bf16."""

    time: StepTime
    tokens_per_second: float
    """Tokens per second of one GPU of those that train."""
    flops_per_second: float
    """Useful operations of each GPU, forward and backward, no recomputation."""
    gib: float
    """Peak of allocated memory on the first pipeline stage."""


def estimate(
    stage: str,
    shape: ModelConfig,
    spec: MixerSpec,
    config: StageConfig,
    parallel: ParallelConfig,
    gpus: int,
) -> Estimate:
    """Return the estimate for a stage that trains on `gpus` H100s; `shape` is the student's, `spec`
    that of its RNN mixer."""
    from megatron_hypenet.planning.layout_search import teacher_and_student
    from megatron_hypenet.planning.machine import H100
    from megatron_hypenet.planning.memory import stage_memory
    from megatron_hypenet.planning.step_time import step_time
    from megatron_hypenet.stages.spec import stage_spec

    teacher, student = teacher_and_student(shape, spec)
    trained = stage_spec(stage).student_shape(teacher, student, spec)
    ranks = gpus // parallel.model_parallel_size
    time = step_time(
        stage, teacher, trained, config, parallel, data_ranks=ranks, machine=H100
    )  # fmt: skip
    memory = stage_memory(stage, teacher, trained, config, parallel, data_ranks=ranks)
    speed = config.tokens_per_step / time.total / gpus
    return Estimate(
        time=time,
        tokens_per_second=speed,
        flops_per_second=speed * stage_spec(stage).flops(config, teacher, trained),
        gib=memory[0].total / 2**30,
    )


def estimate_case(row: dict[str, Any]) -> Estimate:
    """Return the estimate for the only stage of a timed case (`layout_case.py`)."""
    from layout_case import stage_config
    from random_stage import model_config

    from megatron_hypenet.config.mixers import default_mixer
    from megatron_hypenet.config.schema import ParallelConfig

    (stage,) = row["stages"]
    return estimate(
        stage,
        model_config(row["model"], num_layers=row["layers"], changes=row["changes"]),
        default_mixer(),
        stage_config(row),
        ParallelConfig.model_validate(row["parallel"]),
        row["processes"],
    )
