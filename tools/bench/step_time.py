"""Estimated step times beside measured ones, and a table of runs on many GPUs.

    python tools/bench/step_time.py              # every measured point: estimate, ratio
    python tools/bench/step_time.py --scale      # 2B, 5B and 9B on 8 to 1,024 H100s

Needs no GPU. The points are the rows of the files in tools/bench/results/ that each names; all are
of HypeNet-2B in bf16 on H100s. The rates in megatron_hypenet/planning/machine.py were chosen with
these points in view, so the ratios say how well one set of rates describes all of them, not how
well it would foretell another machine."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import estimates  # noqa: E402
from layout_case import CP, PP, TP  # noqa: E402

STEP = "step_h100_202611.md"
DELTA = "delta_mixers_h100_202611.md"
TWO = "parallel_h100x2_202611.md"
OTHER = "two_gpus_h100x2_202611.md"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measured row."""

    source: str
    """File under tools/bench/results/."""
    stage: str
    batch: int
    """Sequences of a micro-batch."""
    tokens: int
    """Tokens of a sequence."""
    milliseconds: float
    """Measured time of a step."""
    micro_batches: int = 1
    """Micro-batches of a step over all replicas."""
    recompute: str = "none"
    mixer: str = "lightning_attn"
    gpus: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)


def _two(milliseconds: float, gpus: int = 2, **parallel: Any) -> Point:
    return Point(
        source=OTHER, stage="finetune", batch=1, tokens=16384, micro_batches=8, gpus=gpus,
        milliseconds=milliseconds, parallel=parallel,
    )  # fmt: skip


def _delta(mixer: str, four: float, many: float, one: float, sixteen: float) -> tuple[Point, ...]:
    """Return the rows of a delta-rule mixer: stage 1 at 4 x 512 and 24 x 512, stage 3 with 1 and 16
    micro-batches."""
    row: dict[str, Any] = {"source": DELTA, "mixer": mixer}
    align = {**row, "stage": "align", "tokens": 512}
    finetune = {
        **row, "stage": "finetune", "batch": 1, "tokens": 16384, "recompute": "selective"
    }  # fmt: skip
    return (
        Point(**align, batch=4, milliseconds=four),
        Point(**align, batch=24, milliseconds=many),
        Point(**finetune, milliseconds=one),
        Point(**finetune, micro_batches=16, milliseconds=sixteen),
    )


def _long(tokens: int, per_gpu: float, gpus: int = 1) -> Point:
    """Return a row with one sequence, measured in tokens per second of a GPU."""
    return Point(
        source=TWO, stage="finetune", batch=1, tokens=tokens, recompute="full", gpus=gpus,
        milliseconds=1e3 * tokens / gpus / per_gpu, parallel={CP: gpus},
    )  # fmt: skip


POINTS = (
    Point(source=STEP, stage="align", batch=4, tokens=512, milliseconds=35.6),
    Point(source=STEP, stage="align", batch=24, tokens=512, milliseconds=159.2),
    Point(source=STEP, stage="distill", batch=12, tokens=512, milliseconds=192.8),
    Point(source=STEP, stage="finetune", batch=1, tokens=16384, milliseconds=408.9),
    Point(
        source=STEP, stage="finetune", batch=1, tokens=16384, micro_batches=16, milliseconds=6290.4
    ),
    *_delta("gated_delta_net", 51.6, 246.7, 543.7, 8491.4),
    *_delta("kimi_delta_attention", 72.1, 357.4, 684.0, 10667.0),
    _long(32768, 29039),
    _long(65536, 22404, gpus=2),
    _long(65536, 23974),
    _long(131072, 16928, gpus=2),
    _two(3221.1, gpus=1),
    _two(1595.3),
    _two(1818.2, **{PP: 2}),
    _two(2647.1, zero_stage=3),
    _two(2278.2, **{TP: 2, "sequence_parallel": True}),
)


def estimate(point: Point) -> Any:
    """Return the estimated StepTime of a measured row."""
    from megatron_hypenet.config.loader import load_model_config
    from megatron_hypenet.config.mixers import mixer_spec
    from megatron_hypenet.config.schema import AlignConfig, HeadStageConfig, ParallelConfig
    from megatron_hypenet.stages.spec import stage_spec

    shape = load_model_config(ROOT / "configs/model/hypenet_2b.yaml")
    spec = mixer_spec(point.mixer)()
    kinds = ["attn" if kind == "attn" else point.mixer for kind in shape.mixer_types]
    settings: dict[str, Any] = {
        "train_iters": 1,
        "seq_length": point.tokens,
        "micro_batch_size": point.batch,
        "global_batch_size": point.batch * point.micro_batches,
        "lr": 1e-4,
        "min_lr": 1e-4,
    }
    config = (
        HeadStageConfig(**settings, recompute=point.recompute)
        if stage_spec(point.stage).through_head
        else AlignConfig(**settings)
    )
    return estimates.estimate(
        point.stage,
        shape.with_mixers(kinds, (spec,)),
        spec,
        config,
        ParallelConfig.model_validate(point.parallel),
        point.gpus,
    ).time


def points_table() -> str:
    """Return a Markdown table of every point."""
    lines = [
        "| stage | mixer | batch x tokens x micro-batches | recompute | layout | measured ms | "
        "estimated ms | ratio | most of a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for point in POINTS:
        found = estimate(point)
        layout = ", ".join(f"{name}={size}" for name, size in point.parallel.items() if size != 1)
        lines.append(
            f"| {point.stage} | {point.mixer} | {point.batch} x {point.tokens} x "
            f"{point.micro_batches} | {point.recompute} | {point.gpus} GPU {layout} | "
            f"{point.milliseconds:.1f} | {1e3 * found.total:.1f} | "
            f"{1e3 * found.total / point.milliseconds:.3f} | {found.shares()} |"
        )
    return "\n".join(lines)


def scale_table() -> str:
    """Return a Markdown table of whole runs with the layout that is estimated fastest."""
    from megatron_hypenet.config.layout import Layout
    from megatron_hypenet.config.loader import load_model_config, load_run_config
    from megatron_hypenet.planning.hours import hours_of
    from megatron_hypenet.planning.layout_search import fits, scaled_batches, teacher_and_student
    from megatron_hypenet.planning.machine import H100
    from megatron_hypenet.planning.planned_work import planned_work

    steps = ("align", "select", "distill", "finetune", "report")
    lines = [
        "| model | GPUs | tensor, pipeline, context, data, ZeRO, recompute | GiB | "
        "stage 1, 2, 3: s/step | tokens/s/GPU | MFU | hours | GPU-hours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size in ("2b", "5b", "9b"):
        run = load_run_config(ROOT / f"configs/run/distill_{size}.yaml", ["teacher=T", "data=D"])
        shape = load_model_config(ROOT / f"configs/model/hypenet_{size}.yaml")
        teacher, _ = teacher_and_student(shape, run.align.spec)
        for gpus in (8, 64, 256, 1024):
            layout = scaled_batches(Layout(shape, run, gpus))
            best = fits(layout, 79.1 * 2**30, H100)[0]
            layout = layout.changed(best.change)
            hours = hours_of(planned_work(layout.run, teacher, steps), layout, H100)
            stages = [row for row in hours if row.optimizer_step is not None]
            parallel = layout.parallel
            sizes = (
                parallel.tensor_model_parallel_size,
                parallel.pipeline_model_parallel_size,
                parallel.context_parallel_size,
                layout.dp_size,
                parallel.zero_stage,
                best.change["finetune.recompute"],
            )
            lines.append(
                f"| {size.upper()} | {gpus} | {', '.join(map(str, sizes))} | "
                f"{best.fullest.memory.needed / 2**30:.0f} | "
                f"{', '.join(f'{row.optimizer_step.total:.2f}' for row in stages)} | "
                f"{', '.join(f'{row.tokens_per_second:,.0f}' for row in stages)} | "
                f"{', '.join(f'{row.mfu:.0%}' for row in stages)} | "
                f"{sum(row.hours for row in hours):.2f} | "
                f"{sum(row.gpu_hours for row in hours):.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", action="store_true", help="runs on many GPUs instead")
    print(scale_table() if parser.parse_args().scale else points_table())


if __name__ == "__main__":
    main()
