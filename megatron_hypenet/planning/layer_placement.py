"""The layers of each pipeline stage while a HALO stage trains: balanced by what that stage
computes, checked, and printed."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import ParallelConfig, StageConfig
from megatron_hypenet.errors import LayoutError
from megatron_hypenet.model.hypenet import HypeNetModel
from megatron_hypenet.model.pipeline_layout import balanced_layout, chunks_of_stage
from megatron_hypenet.parallel import groups
from megatron_hypenet.stages.spec import stage_spec


def placed(
    name: str,
    stage: StageConfig,
    parallel: ParallelConfig,
    teacher: ModelConfig | None,
    student: ModelConfig,
) -> ParallelConfig:
    """Return `parallel` with its pipeline layout settled for training stage `name`; teacher and
    student share one layout, layer by layer.

    `student` has the shape that trains (`StageSpec.student_shape`); `teacher` may be None for a
    stage that needs none. A layout that the user wrote stays. Raises LayoutError when there are
    fewer layers than chunks."""
    if parallel.pipeline_model_parallel_size == 1 or parallel.pipeline_layout is not None:
        return parallel
    costs, head = stage_spec(name).layer_costs(stage, teacher or student, student)
    layout = balanced_layout(
        costs,
        parallel.pipeline_model_parallel_size,
        chunks_per_stage=parallel.virtual_pipeline_model_parallel_size,
        head=head,
    )
    return parallel.model_copy(update={"pipeline_layout": layout})


def check_placement(model: HypeNetModel) -> None:
    """Raise LayoutError unless the pipeline stages together hold every layer exactly once.
    Collective over the pipeline."""
    held = sorted(
        layer
        for part in groups.gather_over_pipeline([block.layer_number - 1 for block in model.layers])
        for layer in part
    )
    if held != list(range(model.model_config.num_layers)):
        raise LayoutError(
            f"pipeline layout {list(model.layout)} places layers {held}, "
            f"not 0 to {model.model_config.num_layers - 1} once each"
        )


def placement_table(layout: Sequence[int], model: ModelConfig, num_stages: int) -> str:
    """Return one line per pipeline stage: the layers of its chunks, and their mixers."""
    lines = []
    for stage in range(num_stages):
        chunks = chunks_of_stage(layout, stage, num_stages)
        kinds = [model.mixer_types[layer] for layers in chunks for layer in layers]
        counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        places = ", ".join(f"{layers[0]}-{layers[-1]}" for layers in chunks)
        lines.append(f"  pipeline stage {stage}: layers {places} ({counted})")
    return "\n".join(lines)
