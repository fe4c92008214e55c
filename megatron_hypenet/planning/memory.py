"""Estimate the GPU memory of one training process by its parts, from shapes and layout alone.

It is the peak of a step in bfloat16 with this package's CUDA kernels: the static part, saved
activations, and the larger of the loss and one layer's backward. The CUDA context, NCCL's buffers
and gaps between allocations are added in `needed`."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_hypenet.config.computation import Fp8Config
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import ParallelConfig, StageConfig
from megatron_hypenet.engine.deepspeed.config import BUCKET_ELEMENTS
from megatron_hypenet.model.pipeline_layout import pipeline_layout
from megatron_hypenet.planning.layer_placement import placed
from megatron_hypenet.stages.footprint import ACCUMULATION_BYTES, COMPUTE_BYTES, StageRank
from megatron_hypenet.stages.spec import stage_spec

STATE = 3 * ACCUMULATION_BYTES
"""Bytes per weight of AdamW's fp32 master and two moments."""
LIVE_WEIGHTS = 10**9
"""Largest number of gathered weights under ZeRO-3 at one time (DeepSpeed's
stage3_max_live_parameters)."""
CONTEXT_BYTES = 2**30
GAPS = 0.03
"""Memory of a CUDA context with NCCL, and the share of memory that is lost in gaps between
allocations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes on one GPU."""

    weights: float
    """Trained weights in bf16."""
    gradients: float
    """fp32 sums, and buckets that are being sent to other ranks."""
    optimizer: float
    """fp32 masters and moments."""
    teacher: float
    """Frozen weights."""
    activations: float
    """Saved activations, and a teacher's hidden states that are kept until their loss."""
    work: float
    """The larger of: the loss with its chunk of logits and the gradient of the head; one layer's
    backward."""

    @property
    def total(self) -> float:
        """Return the sum, which torch reports as the peak of allocated memory."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.teacher
            + self.activations
            + self.work
        )

    @property
    def needed(self) -> float:
        """Return the memory a GPU must have."""
        return self.total * (1 + GAPS) + CONTEXT_BYTES


def stage_memory(
    name: str,
    teacher: ModelConfig,
    student: ModelConfig,
    config: StageConfig,
    parallel: ParallelConfig,
    *,
    data_ranks: int,
    fp8: Fp8Config | None = None,
) -> list[StageMemory]:
    """Return the memory of training stage `name` on every pipeline stage, for a bfloat16 model on
    CUDA.

    `student` has the shape that trains (`StageSpec.student_shape`). `data_ranks` are the replicas:
    processes over tensor * pipeline * context; `fp8` says what is computed in FP8. Raises
    LayoutError for a layout without enough layers."""
    spec = stage_spec(name)
    settled = placed(name, config, parallel, teacher, student)
    layout = pipeline_layout(student, settled)
    found = []
    for index in range(settled.pipeline_model_parallel_size):
        rank = StageRank(config, settled, data_ranks, layout, index, fp8 or Fp8Config())
        held = spec.footprint(rank, teacher, student)
        found.append(
            StageMemory(
                **_states(rank, held.trained),
                teacher=COMPUTE_BYTES * held.frozen - held.frozen_fp8,
                activations=COMPUTE_BYTES * held.activations,
                work=held.work,
            )
        )
    return found


def _states(rank: StageRank, trained: float) -> dict[str, float]:
    """Count weights, gradients and optimizer state of `trained` weights, as DeepSpeed holds them
    under each ZeRO stage."""
    shards = rank.data_ranks * rank.parallel.context_parallel_size
    zero = rank.parallel.zero_stage
    weights = COMPUTE_BYTES * trained
    gradients = ACCUMULATION_BYTES * trained
    optimizer = 0.0 if rank.parallel.offload_optimizer else STATE * trained / shards
    if zero >= 2:
        fp32_copy = ACCUMULATION_BYTES if rank.parallel.gradient_exchange == "float32" else 0
        bucket = min(BUCKET_ELEMENTS, trained) * (COMPUTE_BYTES + fp32_copy)
        gradients = gradients / shards + bucket
    if zero == 3:
        weights = weights / shards + COMPUTE_BYTES * min(LIVE_WEIGHTS, trained)
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer}
