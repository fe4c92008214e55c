"""One training step of each HALO stage on one GPU at HypeNet-2B size with random weights: tokens/s,
MFU, memory, and where the time goes.

    python tools/bench/step.py --out DIR             # CUDA
    python tools/bench/step.py --tiny --out DIR      # anywhere: a tiny model, shows that it works

A fresh process per row. Writes step_<gpu>_<yyyymm>.{json,md,png}. MFU counts useful FLOPs only
(megatron_hypenet/model/flops.py) against the dense bf16 peak. Clock and power are medians over the
timed steps. Memory is the peak of what torch allocated, beside what `hypenet plan` expects. The
reference column is the paper's own code on an H100 80GB (torch 2.11, batch x tokens as in the row),
measured apart from this script, so the ratio holds for that GPU alone. The last row is stage 3 as
the recipe has it on 8 GPUs, 16 micro-batches per GPU and step, beside the paper's code with one."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from figures import Panel  # noqa: E402
from fresh_process import measured, report  # noqa: E402

RECIPE = {"micro_batches": 16, "steps": 2, "warmup": 1}
ROWS = (
    {"stage": "align", "batch": 4, "seq_length": 512, "reference": 11_295.0, "goal": 2.0},
    {"stage": "align", "batch": 24, "seq_length": 512, "reference": 29_606.0, "goal": 2.0},
    {"stage": "distill", "batch": 12, "seq_length": 512, "reference": 14_969.0, "goal": 2.0},
    {"stage": "finetune", "batch": 1, "seq_length": 16_384, "reference": 17_042.0, "goal": 2.5},
    {
        "stage": "finetune",
        "batch": 1,
        "seq_length": 16_384,
        "reference": 17_042.0,
        "goal": None,
        **RECIPE,
    },
)


def measure(row: dict[str, Any], out: Path) -> None:
    """Time the steps of one row in this process."""
    import torch
    from gpu_power import GpuPower
    from random_stage import TimedSteps, build, median, model_config

    from megatron_hypenet.checkpoint.manifest import library_versions
    from megatron_hypenet.config.computation import Fp8Config
    from megatron_hypenet.config.mixers import default_mixer, mixer_spec
    from megatron_hypenet.config.schema import HeadStageConfig, ParallelConfig
    from megatron_hypenet.parallel import groups
    from megatron_hypenet.planning.layout_search import teacher_and_student
    from megatron_hypenet.planning.memory import stage_memory
    from megatron_hypenet.stages.spec import stage_spec
    from megatron_hypenet.supervision.process_exit import exit_process
    from megatron_hypenet.training.metrics import memory_gib
    from megatron_hypenet.training.throughput import Workload, peak_flops

    parallel = ParallelConfig(zero_stage=row["zero_stage"])
    groups.init_parallel(parallel)
    config = HeadStageConfig(
        train_iters=row["warmup"] + row["steps"],
        seq_length=row["seq_length"],
        micro_batch_size=row["batch"],
        global_batch_size=row["batch"] * row["micro_batches"],
        lr=1e-5,
        min_lr=1e-5,
        recompute=row["recompute"],
        cuda_graphs=row["cuda_graphs"],
    )
    mixer = mixer_spec(row["mixer"])() if row["mixer"] else default_mixer()
    student = model_config(row["model"], num_layers=row["layers"], mixer=mixer)
    fp8 = Fp8Config(teacher=row["fp8_teacher"], student=row["fp8_student"])
    stage = build(row["stage"], student, config, parallel, mixer=mixer, impl=row["impl"], fp8=fp8)
    steps = TimedSteps(stage, config, parallel)
    steps.run(row["warmup"])
    with GpuPower() as power:
        steps.run(row["steps"])
    speed = config.tokens_per_step / median(steps.seconds)
    teacher, learner = teacher_and_student(student, mixer)
    learner = stage_spec(row["stage"]).student_shape(teacher, learner, mixer)
    (memory,) = stage_memory(
        row["stage"], teacher, learner, config, parallel, data_ranks=1, fp8=fp8
    )
    graphs = steps.engine.graphs
    work = Workload(
        stage.flops_per_token(config),
        1,
        peak_flops(),
        stage.fp8_flops_per_token(config),
    )
    result = {
        **row,
        "losses": steps.losses,
        "seconds": steps.seconds,
        "tokens_per_second": speed,
        "ratio": speed / row["reference"],
        "tflops": work.tflops_per_device(speed),
        "mfu": work.mfu(speed),
        "utilisation": work.utilisation(speed),
        "memory_gib": memory_gib(),
        "estimated_gib": memory.total / 2**30,
        "replayed": graphs is not None and graphs.captured,
        "no_graph": graphs.failure if graphs else None,
        "clock_mhz": power.clock_mhz,
        "watts": power.watts,
        "limit_watts": power.limit_watts,
        "versions": library_versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }
    if torch.cuda.is_available() and row["profile"] and row["micro_batches"] == 1:
        result |= profiled(steps)
    out.write_text(json.dumps(result))
    exit_process(0)


def profiled(steps: Any) -> dict[str, Any]:
    """Return the milliseconds per step of kernels and operators, in all and of the 40 longest, over
    two steps of a `TimedSteps`."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        steps.run(2)
    events = [event for event in profiler.key_averages() if not event.is_user_annotation]
    found: dict[str, Any] = {}
    for name, kind, length in (
        ("kernels", DeviceType.CUDA, 240),
        ("operators", DeviceType.CPU, 90),
    ):
        spent = [
            (event.self_device_time_total / 2000, event)
            for event in events
            if event.device_type == kind
        ]
        found[f"{name}_ms_per_step"] = sum(ms for ms, _ in spent)
        longest = sorted(spent, key=lambda item: -item[0])[:40]
        found[name] = [
            {"name": event.key[:length], "calls": event.count / 2, "ms": ms}
            for ms, event in longest
        ]
    return found


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what is measured: the rows above, or one small one per stage."""
    shared = {
        "model": options.model,
        "steps": 10,
        "warmup": 4,
        "micro_batches": 1,
        "profile": options.profile,
        "recompute": "none",
    }
    shared |= {
        "layers": options.layers,
        "zero_stage": options.zero_stage,
        "cuda_graphs": not options.no_cuda_graphs,
        "mixer": options.mixer,
        "impl": options.impl,
        "fp8_teacher": options.fp8_teacher,
        "fp8_student": options.fp8_student,
    }
    chosen = {"recompute": options.recompute} if options.recompute else {}
    if options.tiny:
        small = {"model": "tiny", "batch": 2, "seq_length": 64, "steps": 2, "warmup": 1}
        return [
            {**shared, **row, **small, **chosen}
            for row in ROWS
            if row["batch"] != 24 and "micro_batches" not in row
        ]
    return [{**shared, **row, **chosen} for row in ROWS if options.stage in ("", row["stage"])]


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown report."""
    about = next((row for row in results if "versions" in row), None)
    lines = ["# Optimizer steps", ""]
    lines += (
        []
        if about is None
        else [
            ", ".join(
                [
                    about["model"],
                    about["mixer"] or "default mixer",
                    about["device"],
                    *(f"{k} {v}" for k, v in about["versions"].items()),
                ]
            ),
            "",
        ]
    )
    lines += [
        "| stage | batch x tokens | recompute | CUDA graph | tokens/s | step ms | TFLOP/s | MFU | "
        "MHz | W (limit) | memory GiB (estimate) "
        "| reference | ratio | goal |"
    ]
    lines += ["|" + "---|" * 14]
    for row in results:
        begin = f"| {row['stage']} | {size(row)} | {row['recompute']} "
        if "failed" in row:
            lines.append(f"{begin}| | failed" + " |" * 10)
            continue
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        replays = "yes" if row["replayed"] else row["no_graph"] or "no"
        drawn = (
            f"{row['clock_mhz']:.0f} | {row['watts']:.0f} ({row['limit_watts']:.0f})"
            if row["clock_mhz"]
            else "- | -"
        )
        milliseconds = (
            1000
            * row["batch"]
            * row["seq_length"]
            * row["micro_batches"]
            / row["tokens_per_second"]
        )
        lines.append(
            f"{begin}| {replays} | {row['tokens_per_second']:.0f} | {milliseconds:.1f} | "
            f"{row['tflops']:.1f} | {mfu} | {drawn} "
            f"| {row['memory_gib']:.1f} ({row['estimated_gib']:.1f}) | {row['reference']:.0f} | "
            f"{row['ratio']:.2f} | {row['goal'] or ''} |"
        )
    return "\n".join(lines) + "\n"


def size(row: dict[str, Any]) -> str:
    """Return the sequences x tokens of a step, and the micro-batches it is taken in if several."""
    return f"{row['batch']} x {row['seq_length']}" + (
        f", {row['micro_batches']} times" if row["micro_batches"] > 1 else ""
    )


def panels(results: Sequence[dict[str, Any]]) -> list[Panel]:
    """Return the speed of each row that was measured."""
    return [
        Panel(
            f"{row['stage']}, {size(row)} tokens",
            "tokens/s",
            {"ours": row["tokens_per_second"], "the paper's code, timed apart": row["reference"]},
        )
        for row in results
        if "failed" not in row
    ]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on any machine")
    parser.add_argument("--stage", default="", help="only this stage")
    parser.add_argument("--model", default="hypenet_2b", help="a file of configs/model")
    parser.add_argument(
        "--recompute",
        choices=["none", "selective", "full"],
        help="activations computed again, in every row",
    )
    parser.add_argument(
        "--layers",
        type=int,
        help="only so many layers of the model; references and goals do not apply then",
    )
    parser.add_argument(
        "--mixer",
        default="",
        help="RNN mixer in place of the default one; references and goals do not apply then",
    )
    parser.add_argument(
        "--no-cuda-graphs",
        action="store_true",
        help="launch every kernel, also of small micro-batches",
    )
    parser.add_argument(
        "--impl",
        default="local",
        choices=["local", "transformer_engine"],
        help="whose linear layers and attention run",
    )
    parser.add_argument("--fp8-teacher", action="store_true", help="a teacher in FP8")
    parser.add_argument(
        "--fp8-student",
        choices=["current", "delayed", "blockwise"],
        help="a student's linear layers in FP8; with --impl transformer_engine",
    )
    parser.add_argument("--zero-stage", type=int, default=1, choices=[0, 1, 2, 3])
    parser.add_argument(
        "--profile", action="store_true", help="also list the kernels that take longest"
    )
    parser.add_argument("--row", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        measure(json.loads(options.row), options.out)
    results = []
    for row in rows(options):
        results.append(measured([sys.executable, __file__, "--row", json.dumps(row)], row))
        print(
            json.dumps(
                {
                    key: results[-1].get(key)
                    for key in ("stage", "batch", "tokens_per_second", "mfu", "failed")
                }
            ),
            flush=True,
        )
    report(
        results,
        table,
        options.out,
        "step",
        figure=(f"Training steps of {options.model}", panels(results)),
    )


if __name__ == "__main__":
    main()
