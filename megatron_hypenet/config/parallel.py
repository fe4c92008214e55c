"""How the processes of a run share the work, as a frozen pydantic model; schema.py has the settings
of everything else."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from megatron_hypenet.config.fields import Count, Section
from megatron_hypenet.config.model import PositiveInt, Switch


class ParallelConfig(Section):
    """How the processes share the work. Data parallelism is what is left: world size / (tensor *
    pipeline * context)."""

    tensor_model_parallel_size: PositiveInt = Field(
        default=1, description="Processes that split every matrix (--tp)."
    )
    pipeline_model_parallel_size: PositiveInt = Field(
        default=1, description="Groups of consecutive layers on different processes (--pp)."
    )
    virtual_pipeline_model_parallel_size: PositiveInt = Field(
        default=1,
        description="Chunks of consecutive layers on each pipeline stage, which take turns "
        "(interleaved 1F1B). More chunks leave a stage idle for less of a step, and send hidden "
        "states more often; needs micro-batches in multiples of the pipeline size.",
    )
    context_parallel_size: PositiveInt = Field(
        default=1, description="Processes that split every sequence (--cp)."
    )
    sequence_parallel: Switch = Field(
        default=False,
        description="Split norms and residuals over the tensor-parallel processes too.",
    )
    # a stage of 0 layers is left to config/layout_rules.py, which knows the model and can say what
    # would fit
    pipeline_layout: Annotated[tuple[Count, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="Layers per pipeline stage, first to last, e.g. [8, 10, 10]; with several "
        "chunks per stage, layers per chunk in order of the layers, which go round the stages. "
        "null balances the stages by mixer cost.",
    )
    context_parallel_method: Literal["all_gather", "ring"] = Field(
        default="all_gather",
        description="How softmax attention gets the keys of the other context-parallel processes: "
        "all_gather fetches all at once, "
        "ring passes them on one by one and needs less memory.",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1,
        description="DeepSpeed ZeRO: 0 replicates, 1 shards optimizer state, 2 also gradients, "
        "3 also weights.",
    )
    gradient_exchange: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Type in which data-parallel processes add up the gradients of a bfloat16 "
        "model: float32 loses nothing, bfloat16 sends "
        "half the bytes and rounds every sum.",
    )
    offload_optimizer: Switch = Field(
        default=False,
        description="Keep optimizer state and update in CPU memory: slower steps, less GPU memory.",
    )

    @property
    def model_parallel_size(self) -> int:
        """Return the number of processes that hold one replica of the model and of its sequence."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    @property
    def interleaved(self) -> bool:
        """Return whether the pipeline's stages hold several chunks each."""
        return self.virtual_pipeline_model_parallel_size > 1

    @property
    def num_chunks(self) -> int:
        """Return the number of chunks of consecutive layers that a pipeline's stages hold
        together: as many as stages, times the chunks of each."""
        return self.pipeline_model_parallel_size * self.virtual_pipeline_model_parallel_size

    @property
    def sequence_unit(self) -> int:
        """Return the number that sequence lengths are multiples of: two chunks per context-parallel
        process, each process's tokens split again for sequence parallelism."""
        context = self.context_parallel_size
        unit = 2 * context if context > 1 else 1
        return (
            math.lcm(unit, context * self.tensor_model_parallel_size)
            if self.sequence_parallel
            else unit
        )
