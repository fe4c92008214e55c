"""`hypenet plan`: the GPU memory of every training stage on a layout, layouts that fit, and hours,
without a GPU and without weights."""

from __future__ import annotations

import json
from dataclasses import asdict
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
from megatron_hypenet.config.layout import SEQUENCE, VIRTUAL, ZERO, Layout
from megatron_hypenet.config.loader import load_model_config, load_run_config
from megatron_hypenet.config.paths import download_hint
from megatron_hypenet.config.schema import RunConfig
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
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus",
            min=1,
            metavar="N",
            help="Plan for N GPUs with the layout that is estimated fastest, whatever the "
            "configuration says of one.",
        ),
    ] = None,
    scale_batch: Annotated[
        bool,
        typer.Option(
            "--scale-batch",
            help="Where a stage's batch has too few sequences for N GPUs, take more of them in "
            "fewer steps: as many tokens in all.",
        ),
    ] = False,
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

    For bfloat16 on CUDA, from shapes alone; needs no GPU, no weights and no data. Times are
    estimates from rates measured on one and two H100s (docs/scaling.md). Exit code 3 when a stage
    does not fit.

    Examples:

      hypenet plan configs/run/distill_9b.yaml teacher=/models/Qwen3-8B data=corpus
        --model configs/model/hypenet_9b.yaml --gpus 64 --scale-batch

      hypenet plan configs/run/distill_2b.yaml teacher=/models/Qwen3-1.7B data=corpus
        --model configs/model/hypenet_9b.yaml --world-size 8 parallel.zero_stage=2
        distill.recompute=full finetune.recompute=full
    """
    from megatron_hypenet.planning.machine import machine

    rates = machine(gpu)
    if gpus is not None and world_size is not None:
        raise UsageError("--gpus chooses a layout, --world-size keeps the configured one; give one")
    if scale_batch and gpus is None:
        raise UsageError("--scale-batch is for --gpus N")
    run = load_run_config(config, collect_overrides(overrides, tp=tp, pp=pp, cp=cp))
    shape = load_model_config(model) if model else shape_if_present(run.teacher)
    if shape is None:
        raise CheckpointError(
            f"teacher {run.teacher} is not here, and its shape is needed; "
            f"name one with --model configs/model/NAME.yaml{download_hint(run.teacher)}"
        )
    if gpus is None:
        check_and_warn(run, shape, world_size)
    from megatron_hypenet.halo.run_folder import RunFolder
    from megatron_hypenet.halo.tasks import halo_steps
    from megatron_hypenet.planning.disk import disk_need, text_bytes
    from megatron_hypenet.planning.hours import hours_of
    from megatron_hypenet.planning.layout_search import (
        fits,
        fullest,
        needs,
        scaled_batches,
        teacher_and_student,
    )
    from megatron_hypenet.planning.planned_work import planned_work

    layout = Layout(shape, run, gpus or world_size)
    if scale_batch:
        layout = scaled_batches(layout)
    others = fits(layout, gpu_memory * GIB, rates)
    if gpus is not None:
        if not others:
            raise LayoutError(
                f"no layout on {gpus} GPUs of {gpu_memory:g} GiB fits and divides the batches; "
                + ("use other --gpus" if scale_batch else "try --scale-batch, or other --gpus")
            )
        layout = layout.changed(others[0].change)
    run = layout.run
    found = needs(layout)
    top = fullest(found)
    steps = [step.name for step in halo_steps(run, RunFolder(run.output_dir))]
    teacher, _ = teacher_and_student(shape, run.align.spec)
    hours = hours_of(planned_work(run, teacher, steps), layout, rates)
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
    each = parallel.virtual_pipeline_model_parallel_size
    chunks = f" with {each} chunks a stage" if parallel.interleaved else ""
    lines = [
        f"{layout.processes} GPUs: tensor {parallel.tensor_model_parallel_size}, "
        f"pipeline {parallel.pipeline_model_parallel_size}{chunks}, "
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
    from megatron_hypenet.planning.hours import Hours

    whole = Hours(
        step="whole run",
        hours=sum(row.hours for row in hours),
        gpu_hours=sum(row.gpu_hours for row in hours),
    )
    lines = [
        f"estimated hours on {gpus} {gpu} (docs/scaling.md); saves and moved files are left out",
        f"{'step':<10}{'hours':>10}{'GPU-hours':>12}"
        + (f"{'cost':>12}" if price else "")
        + f"{'s/step':>10}{'tokens/s/GPU':>14}{'MFU':>8}  most of a step",
    ]
    for row in [*hours, whole]:
        line = f"{row.step:<10}{row.hours:10.2f}{row.gpu_hours:12.1f}"
        if price:
            line += f"{row.gpu_hours * price:12,.0f}"
        if row.optimizer_step is not None:
            line += f"{row.optimizer_step.total:10.3f}{row.tokens_per_second:14,.0f}"
            line += f"{row.mfu:8.1%}  {row.optimizer_step.shares()}"
        lines.append(line)
    return lines


def hours_summary(hours: list[Hours], price: float | None) -> dict[str, dict[str, Any]]:
    """Return the hours by step, for machines."""
    return {
        row.step: {"hours": round(row.hours, 4), "gpu_hours": round(row.gpu_hours, 3)}
        | ({} if price is None else {"cost": round(row.gpu_hours * price, 2)})
        | _step_summary(row)
        for row in hours
    }


def _step_summary(row: Hours) -> dict[str, Any]:
    if row.optimizer_step is None:
        return {}
    return {
        "step_seconds": round(row.optimizer_step.total, 6),
        "tokens_per_second_per_gpu": round(row.tokens_per_second, 1),
        "mfu": round(row.mfu, 4),
        "seconds": {name: round(value, 6) for name, value in asdict(row.optimizer_step).items()},
    }


def disk_line(need: DiskNeed, run: RunConfig) -> str:
    """Return what the run takes on the disk, and what is there for it."""
    from megatron_hypenet.byte_sizes import size_text
    from megatron_hypenet.planning.disk import described, free_bytes

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
        f"layouts that fit {gpu_memory:g} GiB, fastest first by estimate (the first "
        f"{min(SHOWN, len(others))} of {len(others)}):"
    ]
    return lines + [
        f"  {spelled(fit)}  ({fit.hours:.2f} h, {fit.fullest.stage} "
        f"{fit.fullest.memory.needed / GIB:.1f} GiB)"
        for fit in others[:SHOWN]
    ]


def spelled(fit: Fit) -> str:
    """Return a layout as words for the command line."""
    names = {"tensor_model": "--tp", "pipeline_model": "--pp", "context": "--cp"}
    sizes = [
        f"{flag} {fit.change[f'parallel.{name}_parallel_size']}" for name, flag in names.items()
    ]
    settings = {ZERO: fit.change[ZERO]} | ({SEQUENCE: True} if fit.change[SEQUENCE] else {})
    settings |= {VIRTUAL: fit.change[VIRTUAL]} if fit.change[VIRTUAL] != 1 else {}
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
            {
                **fit.change,
                "stage": fit.fullest.stage,
                "needed": round(fit.fullest.memory.needed),
                "hours": round(fit.hours, 4),
            }
            for fit in others
        ],
    }
