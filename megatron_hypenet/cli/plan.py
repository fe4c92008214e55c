"""`hypenet plan`: the GPU memory of every training stage on a layout, and layouts that fit, without
a GPU and without weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_hypenet.cli.config import check_and_warn, shape_if_present
from megatron_hypenet.cli.options import (
    ConfigArgument,
    ContextParallelOption,
    JsonOption,
    OverridesArgument,
    PipelineParallelOption,
    ShapeOption,
    TensorParallelOption,
    WorldSizeOption,
    collect_overrides,
)
from megatron_hypenet.config.layout import SEQUENCE, ZERO, Layout
from megatron_hypenet.config.loader import load_model_config, load_run_config
from megatron_hypenet.errors import CheckpointError, LayoutError

if TYPE_CHECKING:
    from megatron_hypenet.planning.layout_search import Fit, StageNeed

app = typer.Typer(add_completion=False, rich_markup_mode=None)

GIB = 2**30
H100_GIB = 79.1
"""What an H100 of 80 GB offers."""
SHOWN = 5
PARTS = ("weights", "gradients", "optimizer", "teacher", "activations", "work")


@app.command()
def plan(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    tp: TensorParallelOption = None,
    pp: PipelineParallelOption = None,
    cp: ContextParallelOption = None,
    model: ShapeOption = None,
    world_size: WorldSizeOption = None,
    gpu_memory: Annotated[
        float,
        typer.Option(
            "--gpu-memory",
            min=1.0,
            metavar="GIB",
            help="Memory of one GPU in GiB; the default is an H100 of 80 GB.",
        ),
    ] = H100_GIB,
    as_json: JsonOption = False,
) -> None:
    """Say how much GPU memory each training stage takes, whether it fits, and which layouts do.

    For bfloat16 on CUDA, from shapes alone; needs no GPU, no weights and no data. Exit code 3 when
    a stage does not fit.

    Example:

      hypenet plan configs/run/distill_2b.yaml teacher=T data=D
        --model configs/model/hypenet_9b.yaml --world-size 8
    """
    run = load_run_config(config, collect_overrides(overrides, tp=tp, pp=pp, cp=cp))
    shape = load_model_config(model) if model else shape_if_present(run.teacher)
    if shape is None:
        raise CheckpointError(
            f"teacher {run.teacher} is not here, and its shape is needed; "
            "name one with --model configs/model/NAME.yaml"
        )
    check_and_warn(run, shape, world_size)
    from megatron_hypenet.planning.layout_search import fits, fullest, needs

    layout = Layout(shape, run, world_size)
    found = needs(layout)
    others = fits(layout, gpu_memory * GIB)
    top = fullest(found)
    if as_json:
        typer.echo(json.dumps(summary(layout, found, others, gpu_memory)))
    else:
        typer.echo("\n".join([*table(layout, found), *advice(others, gpu_memory)]))
    if top.memory.needed > gpu_memory * GIB:
        raise LayoutError(
            f"{top.stage} needs {top.memory.needed / GIB:.1f} GiB on pipeline stage "
            f"{top.pipeline_stage}, a GPU has {gpu_memory:g}; "
            + (
                f"use {spelled(others[0])}"
                if others
                else f"use more than {layout.processes} GPUs, or a smaller micro_batch_size"
            )
        )


def table(layout: Layout, found: list[StageNeed]) -> list[str]:
    """One row per training stage, in GiB."""
    parallel = layout.parallel
    lines = [
        f"{layout.processes} GPUs: tensor {parallel.tensor_model_parallel_size}, "
        f"pipeline {parallel.pipeline_model_parallel_size}, "
        f"context {parallel.context_parallel_size}, data {layout.dp_size}, "
        f"ZeRO {parallel.zero_stage}; GiB on the fullest GPU",
        f"{'stage':<10}{'micro-batch':>14}"
        + "".join(f"{part:>13}" for part in PARTS)
        + f"{'needed':>10}",
    ]
    for need in found:
        stage = layout.run.stage(need.stage)
        size = f"{stage.micro_batch_size} x {stage.seq_length}"
        parts = "".join(f"{getattr(need.memory, part) / GIB:13.1f}" for part in PARTS)
        lines.append(f"{need.stage:<10}{size:>14}{parts}{need.memory.needed / GIB:10.1f}")
    lines.append(
        "work: the loss with its logits, or one layer's backward; needed: with 1 GiB for CUDA and "
        "NCCL and 3% of gaps"
    )
    return lines


def advice(others: list[Fit], gpu_memory: float) -> list[str]:
    """The layouts to try first."""
    if not others:
        return [f"no layout on these GPUs fits {gpu_memory:g} GiB"]
    lines = [
        f"layouts that fit {gpu_memory:g} GiB, least model parallelism first (the first "
        f"{min(SHOWN, len(others))} of {len(others)}):"
    ]
    return lines + [
        f"  {spelled(fit)}  ({fit.fullest.stage} {fit.fullest.memory.needed / GIB:.1f} GiB)"
        for fit in others[:SHOWN]
    ]


def spelled(fit: Fit) -> str:
    """A layout as words for the command line."""
    names = {"tensor_model": "--tp", "pipeline_model": "--pp", "context": "--cp"}
    sizes = [
        f"{flag} {fit.change[f'parallel.{name}_parallel_size']}" for name, flag in names.items()
    ]
    settings = {ZERO: fit.change[ZERO]} | ({SEQUENCE: True} if fit.change[SEQUENCE] else {})
    settings |= {key: value for key, value in fit.change.items() if key.endswith(".recompute")}
    return " ".join([*sizes, *(f"{key}={str(value).lower()}" for key, value in settings.items())])


def summary(
    layout: Layout, found: list[StageNeed], others: list[Fit], gpu_memory: float
) -> dict[str, Any]:
    """All of it in bytes, for machines."""
    stages = {
        need.stage: {
            part: round(getattr(need.memory, part)) for part in (*PARTS, "total", "needed")
        }
        | {"pipeline_stage": need.pipeline_stage}
        for need in found
    }
    return {
        "processes": layout.processes,
        "data_parallel_size": layout.dp_size,
        "gpu_memory_gib": gpu_memory,
        "fits": all(need.memory.needed <= gpu_memory * GIB for need in found),
        "stages": stages,
        "layouts_that_fit": [
            {**fit.change, "stage": fit.fullest.stage, "needed": round(fit.fullest.memory.needed)}
            for fit in others
        ],
    }
