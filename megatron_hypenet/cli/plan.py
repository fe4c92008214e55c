"""`hypenet plan`: the GPU memory of every training stage on a layout, layouts that fit, and hours,
without a GPU and without weights."""

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
from megatron_hypenet.config.paths import download_hint
from megatron_hypenet.config.schema import STAGES, RunConfig
from megatron_hypenet.errors import CheckpointError, LayoutError, UsageError

if TYPE_CHECKING:
    from megatron_hypenet.planning.disk import DiskNeed
    from megatron_hypenet.planning.hours import Hours
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
    gpu: Annotated[
        str,
        typer.Option("--gpu", metavar="NAME", help="Kind of GPU for hours, e.g. H100 or A100."),
    ] = "H100",
    price: Annotated[
        float | None,
        typer.Option("--price", min=0.0, metavar="X", help="Price of a GPU-hour, to show costs."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say how much GPU memory each training stage takes, whether it fits, which layouts do, and how
    many hours and how much of the disk a run takes.

    For bfloat16 on CUDA, from shapes alone; needs no GPU, no weights and no data. Hours are for the
    share of the GPU's peak that each stage reached on an H100. Exit code 3 when a stage does not
    fit.

    Example:

      hypenet plan configs/run/distill_2b.yaml teacher=/models/Qwen3-1.7B data=corpus
        --model configs/model/hypenet_9b.yaml --world-size 8 parallel.zero_stage=2
        distill.recompute=full finetune.recompute=full
    """
    from megatron_hypenet.training.throughput import PEAK_BF16, peak_flops

    peak = peak_flops(gpu)
    if peak is None:
        raise UsageError(f"--gpu {gpu}: its peak is not known; use one of {', '.join(PEAK_BF16)}")
    run = load_run_config(config, collect_overrides(overrides, tp=tp, pp=pp, cp=cp))
    shape = load_model_config(model) if model else shape_if_present(run.teacher)
    if shape is None:
        raise CheckpointError(
            f"teacher {run.teacher} is not here, and its shape is needed; "
            f"name one with --model configs/model/NAME.yaml{download_hint(run.teacher)}"
        )
    check_and_warn(run, shape, world_size)
    from megatron_hypenet.halo.run_folder import RunFolder
    from megatron_hypenet.halo.tasks import halo_steps
    from megatron_hypenet.planning.disk import disk_need, text_bytes
    from megatron_hypenet.planning.eta import planned_work
    from megatron_hypenet.planning.hours import hours_of
    from megatron_hypenet.planning.layout_search import (
        fits,
        fullest,
        needs,
        teacher_and_student,
    )

    layout = Layout(shape, run, world_size)
    found = needs(layout)
    others = fits(layout, gpu_memory * GIB)
    top = fullest(found)
    steps = [step.name for step in halo_steps(run, RunFolder(run.output_dir))]
    teacher, _ = teacher_and_student(shape, run.align.spec)
    hours = hours_of(
        planned_work(run, teacher, steps),
        gpus=layout.processes,
        peak=peak,
        recompute={name: getattr(run.stage(name), "recompute", "none") for name in STAGES},
    )
    disk = disk_need(shape, run, text_bytes=text_bytes(run))
    if as_json:
        content = summary(layout, found, others, gpu_memory)
        more = {"gpu": gpu, "hours": hours_summary(hours, price), "disk": disk_summary(disk, run)}
        typer.echo(json.dumps({**content, **more}))
    else:
        times = hours_table(hours, gpu, layout.processes, price)
        ends = [*advice(others, gpu_memory), disk_line(disk, run)]
        typer.echo("\n".join([*table(layout, found), *times, *ends]))
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
    """Return one row per training stage, in GiB."""
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


def hours_table(hours: list[Hours], gpu: str, gpus: int, price: float | None) -> list[str]:
    """Return one row per step that computes, and the sum."""
    total = ("whole run", sum(row.hours for row in hours), sum(row.gpu_hours for row in hours))
    heading = f"{'step':<10}{'hours':>10}{'GPU-hours':>12}" + (f"{'cost':>12}" if price else "")
    lines = [
        f"hours on {gpus} {gpu}, where each step reaches the share of the peak that it reached on "
        "an H100; saves and moved files are left out",
        heading,
    ]
    for name, time, gpu_hours in [*((row.step, row.hours, row.gpu_hours) for row in hours), total]:
        cost = f"{gpu_hours * price:12,.0f}" if price else ""
        lines.append(f"{name:<10}{time:10.2f}{gpu_hours:12.1f}{cost}")
    return lines


def hours_summary(hours: list[Hours], price: float | None) -> dict[str, dict[str, float]]:
    """Return the hours by step, for machines."""
    return {
        row.step: {"hours": round(row.hours, 4), "gpu_hours": round(row.gpu_hours, 3)}
        | ({} if price is None else {"cost": round(row.gpu_hours * price, 2)})
        for row in hours
    }


def disk_line(need: DiskNeed, run: RunConfig) -> str:
    """Return what the run takes on the disk, and what is there for it."""
    from megatron_hypenet.planning.disk import described, free_bytes, size_text

    there = free_bytes(run.output_dir)
    return (
        f"disk: {size_text(need.peak)} in {run.output_dir} ({described(need)}); "
        f"{size_text(there)} are free"
        + (", which is too little: submit refuses it" if there < need.peak else "")
    )


def disk_summary(need: DiskNeed, run: RunConfig) -> dict[str, int]:
    """Return the disk space in bytes, for machines."""
    from megatron_hypenet.planning.disk import free_bytes

    sizes = {name: round(size) for name, size in need.parts.items()}
    return {
        **sizes,
        "saving": round(need.saving),
        "peak": round(need.peak),
        "free": free_bytes(run.output_dir),
    }


def advice(others: list[Fit], gpu_memory: float) -> list[str]:
    """Return the layouts to try first."""
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
    """Return a layout as words for the command line."""
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
    """Return all of it in bytes, for machines."""
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
