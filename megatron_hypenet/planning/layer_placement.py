"""Which layers lie on which pipeline stage while a HALO stage trains: balanced by what that stage
computes, checked, and shown."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import ParallelConfig, StageConfig
from megatron_hypenet.errors import LayoutError
from megatron_hypenet.model.flops import BACKWARD, head_flops, mixer_flops
from megatron_hypenet.model.hypenet import HypeNetModel
from megatron_hypenet.model.pipeline_layout import balanced_layout, layer_costs, layers_of_stage
from megatron_hypenet.parallel import groups


def placed(
    name: str,
    stage: StageConfig,
    parallel: ParallelConfig,
    teacher: ModelConfig | None,
    student: ModelConfig,
) -> ParallelConfig:
    """`parallel` with its pipeline layout settled for training stage `name`; teacher and student
    share one layout, layer by layer.

    For align `student` has an RNN mixer in every layer (`ModelConfig.converted`). A layout that the
    user wrote stays. Raises LayoutError when there are fewer layers than pipeline stages."""
    if parallel.pipeline_model_parallel_size == 1 or parallel.pipeline_layout is not None:
        return parallel
    costs, head = _costs(name, stage.seq_length, teacher, student)
    layout = balanced_layout(costs, parallel.pipeline_model_parallel_size, head=head)
    return parallel.model_copy(update={"pipeline_layout": layout})


def _costs(
    name: str, seq_length: int, teacher: ModelConfig | None, student: ModelConfig
) -> tuple[list[float], float]:
    """Work of one HALO stage per layer and for the head, in FLOPs per token."""
    frozen = layer_costs(teacher, seq_length) if teacher is not None else [0.0] * student.num_layers
    training = 1 + BACKWARD
    if name == "align":  # no head, and the MLPs are the trunk's alone
        mixers = mixer_flops(student, seq_length)
        return [
            before + training * mixer for before, mixer in zip(frozen, mixers, strict=True)
        ], 0.0
    heads = training * head_flops(student) + (head_flops(teacher) if teacher is not None else 0.0)
    return [
        before + training * cost
        for before, cost in zip(frozen, layer_costs(student, seq_length), strict=True)
    ], heads


def check_placement(model: HypeNetModel) -> None:
    """LayoutError unless the pipeline stages together hold every layer exactly once. Collective
    over the pipeline."""
    held = [
        layer
        for part in groups.gather_over_pipeline(
            [block.layer_number - 1 for block in model.decoder.layers]
        )
        for layer in part
    ]
    if held != list(range(model.model_config.num_layers)):
        raise LayoutError(
            f"pipeline layout {list(model.layout)} places layers {held}, "
            f"not 0 to {model.model_config.num_layers - 1} once each"
        )


def placement_table(layout: Sequence[int], model: ModelConfig) -> str:
    """One line per pipeline stage: its layers and their mixers."""
    lines = []
    for stage in range(len(layout)):
        layers = layers_of_stage(layout, stage)
        kinds = [model.mixer_types[layer] for layer in layers]
        counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        lines.append(f"  pipeline stage {stage}: layers {layers[0]}-{layers[-1]} ({counted})")
    return "\n".join(lines)
