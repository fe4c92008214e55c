"""Layouts on two GPUs against one: the same numbers in bf16, how well context parallelism scales
stage 3, and the speed of the other layouts.

    python tools/bench/parallel.py --out DIR         # two GPUs: HypeNet-2B layers, 64K and 128K
    python tools/bench/parallel.py --tiny --out DIR  # anywhere: two CPU processes, a tiny model

Starts its own processes. Writes parallel_<gpu>_<yyyymm>.{json,md}. Efficiency is tokens/s of each
GPU over those of one GPU with the same number of tokens of its own; "by work" counts FLOPs instead
of tokens, because a token of a longer sequence attends to more. For the other layouts it is the
tokens/s of each GPU over those of one GPU that makes the same steps."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from fresh_process import measured, report  # noqa: E402

TP = "tensor_model_parallel_size"
PP = "pipeline_model_parallel_size"
CP = "context_parallel_size"
PARITY = {
    "one GPU": (1, {}),
    "TP2 + SP": (2, {TP: 2, "sequence_parallel": True}),
    "PP2": (2, {PP: 2}),
    "CP2": (2, {CP: 2}),
    "CP2 ring": (2, {CP: 2, "context_parallel_method": "ring"}),
    "DP2 ZeRO-1": (2, {"zero_stage": 1}),
    "DP2 ZeRO-3": (2, {"zero_stage": 3}),
}
OTHERS = ("one GPU", "TP2 + SP", "PP2", "DP2 ZeRO-3", "DP2 ZeRO-1")
"""Layouts of the speed rows: steps of 8 sequences, as many on one GPU as on two."""


def cases(tiny: bool) -> list[dict[str, Any]]:
    """Return everything that is run, in order."""
    shape = (
        {"model": "tiny", "layers": 4, "vocab": 512}
        if tiny
        else {"model": "hypenet_2b", "layers": 4, "vocab": 32768}
    )
    length = 64 if tiny else 4096
    found = [
        {
            "kind": "parity",
            "layout": name,
            "stage": stage,
            "processes": processes,
            "parallel": parallel,
            **shape,
            "seq_length": length,
            "global_batch": 4,
            "steps": 4,
            "warmup": 0,
            "by_name": True,
            "recompute": "none",
        }
        for stage in (("distill",) if tiny else ("distill", "finetune"))
        for name, (processes, parallel) in PARITY.items()
        if not tiny or name in ("one GPU", "CP2")
    ]
    whole = (
        {"model": "tiny", "layers": None, "vocab": 512}
        if tiny
        else {"model": "hypenet_2b", "layers": None, "vocab": None}
    )
    for total in (128,) if tiny else (65536, 131072):
        for name, processes, parallel, tokens in (
            ("one GPU", 1, {}, total // 2),
            ("CP2", 2, {CP: 2}, total),
        ):
            found.append(
                {
                    "kind": "efficiency",
                    "layout": name,
                    "stage": "finetune",
                    "processes": processes,
                    "parallel": parallel,
                    **whole,
                    "seq_length": tokens,
                    "global_batch": 1,
                    "steps": 2 if tiny else 5,
                    "warmup": 1 if tiny else 2,
                    "by_name": False,
                    "recompute": "full",
                }
            )
    for name in OTHERS:
        processes, parallel = PARITY[name]
        found.append(
            {
                "kind": "speed",
                "layout": name,
                "stage": "finetune",
                "processes": processes,
                "parallel": parallel,
                **whole,
                "seq_length": 64 if tiny else 16384,
                "global_batch": 8,
                "steps": 3,
                "warmup": 1,
                "by_name": False,
                "recompute": "none",
            }
        )
    return found


def work(case: dict[str, Any], out: Path) -> None:
    """Run one process of one case; the first writes what was measured."""
    import torch
    from random_stage import TimedSteps, build, median, model_config

    from megatron_hypenet.config.schema import HeadStageConfig, ParallelConfig
    from megatron_hypenet.parallel import groups
    from megatron_hypenet.parallel.context import state_exchange
    from megatron_hypenet.supervision.process_exit import exit_process
    from megatron_hypenet.training.metrics import memory_gib
    from megatron_hypenet.training.throughput import peak_flops

    parallel = ParallelConfig.model_validate(case["parallel"])
    student = model_config(case["model"], num_layers=case["layers"], vocab_size=case["vocab"])
    config = HeadStageConfig(
        train_iters=case["steps"] + case["warmup"],
        seq_length=case["seq_length"],
        micro_batch_size=1,
        global_batch_size=case["global_batch"],
        lr=1e-5,
        min_lr=1e-5,
        recompute=case["recompute"],
    )
    groups.init_parallel(parallel)
    exchanged = []
    send = state_exchange.StateTransfer.send

    def counted(transfer: Any, *mine: Any) -> None:
        exchanged.append(
            sum(x.numel() * x.element_size() for x in mine) * (transfer.group.size() - 1)
        )
        send(transfer, *mine)

    state_exchange.StateTransfer.send = counted  # type: ignore[method-assign]
    stage = build(case["stage"], student, config, parallel, by_name=case["by_name"])
    steps = TimedSteps(stage, config, parallel)
    steps.run(case["warmup"])
    steps.run(case["steps"])
    seconds = steps.seconds
    kernels = busiest_kernels(lambda: steps.run(1)) if case["profile"] else []
    steps.close()
    tokens_per_second = config.tokens_per_step / median(seconds)
    flops = stage.flops_per_token(config)
    peak = peak_flops()
    result = {
        **case,
        "losses": steps.losses,
        "grad_norms": steps.norms,
        "seconds": seconds,
        "tokens_per_second": tokens_per_second,
        "flops_per_second_per_gpu": tokens_per_second * flops / case["processes"],
        "mfu": tokens_per_second * flops / case["processes"] / peak if peak else None,
        "memory_gib": memory_gib(),
        "kernels": kernels,
        "lightning_bytes_per_exchange": max(exchanged, default=0),
        "lightning_exchanges_per_step": len(exchanged) / len(steps.losses),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "torch": torch.__version__,
    }
    if groups.rank() == 0:
        out.write_text(json.dumps(result))
    exit_process(0)


def busiest_kernels(step: Callable[[], None], count: int = 40) -> list[dict[str, Any]]:
    """Return what the GPU did during `step`: milliseconds and launches of the kernels that took
    longest, under the sum of all."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        step()
    events = [
        event
        for event in found.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and event.self_device_time_total > 0
    ]
    events.sort(key=lambda event: -event.self_device_time_total)
    rows = [
        {"kernel": event.key[:120], "ms": event.self_device_time_total / 1e3, "times": event.count}
        for event in events
    ]
    total = sum(row["ms"] for row in rows)
    return [{"kernel": "all", "ms": total, "times": sum(row["times"] for row in rows)}] + rows[
        :count
    ]


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Start the processes of one case and wait; what went wrong is part of the result."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={case['processes']}",
        __file__,
    ]
    return measured([*command, "--work", json.dumps(case)], case)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown report."""
    lines = [
        "| stage | layout | losses | norms | largest difference of loss, norm |",
        "|---|---|---|---|---|",
    ]
    for row in (row for row in results if row["kind"] == "parity"):
        if "failed" in row:
            lines.append(f"| {row['stage']} | {row['layout']} | failed | | |")
            continue
        one = next(
            r
            for r in results
            if r["kind"] == "parity" and r["stage"] == row["stage"] and r["layout"] == "one GPU"
        )
        apart = [
            max(abs(a - b) / abs(a) for a, b in zip(one[key], row[key], strict=True))
            for key in ("losses", "grad_norms")
        ]
        losses, norms = (
            " ".join(f"{value:.5f}" for value in row[key]) for key in ("losses", "grad_norms")
        )
        lines.append(
            f"| {row['stage']} | {row['layout']} | {losses} | {norms} | {apart[0]:.1e}, "
            f"{apart[1]:.1e} |"
        )
    lines += [
        "",
        "| tokens per GPU | layout | tokens per sequence | tokens/s/GPU | MFU | memory GiB | "
        "efficiency | by work | Lightning bytes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in (row for row in results if row["kind"] == "efficiency"):
        if "failed" in row:
            lines.append(
                f"| {row['seq_length'] // row['processes']} | {row['layout']} | "
                f"{row['seq_length']} | failed | | | | | |"
            )
            continue
        own = row["seq_length"] // row["processes"]
        one = next(
            r
            for r in results
            if r["kind"] == "efficiency" and r["processes"] == 1 and r["seq_length"] == own
        )
        each = row["tokens_per_second"] / row["processes"]
        share = each / one["tokens_per_second"]
        by_work = row["flops_per_second_per_gpu"] / one["flops_per_second_per_gpu"]
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        lines.append(
            f"| {own} | {row['layout']} | {row['seq_length']} | {each:.0f} | {mfu} | "
            f"{row['memory_gib']:.1f} | {share:.1%} | {by_work:.1%} "
            f"| {row['lightning_bytes_per_exchange']} |"
        )
    speeds = [row for row in results if row["kind"] == "speed"]
    if speeds:
        lines += [
            "",
            "| layout | tokens x sequences | ms a step | tokens/s/GPU | MFU | memory GiB | "
            "of one GPU |",
            "|---|---|---|---|---|---|---|",
        ]
    for row in speeds:
        sizes = f"{row['seq_length']} x {row['global_batch']}"
        if "failed" in row:
            lines.append(f"| {row['layout']} | {sizes} | failed | | | | |")
            continue
        each = row["tokens_per_second"] / row["processes"]
        alone = [r for r in speeds if r["processes"] == 1 and "failed" not in r]
        share = f"{each / alone[0]['tokens_per_second']:.1%}" if alone else "-"
        seconds = sorted(row["seconds"])[len(row["seconds"]) // 2]
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        lines.append(
            f"| {row['layout']} | {sizes} | {1e3 * seconds:.1f} | {each:.0f} | {mfu} | "
            f"{row['memory_gib']:.1f} | {share} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on two CPU processes")
    parser.add_argument(
        "--only", default="", help="only cases of this kind: parity, efficiency or speed"
    )
    parser.add_argument("--stage", default="", help="only cases of this stage")
    parser.add_argument("--layout", action="append", help="only this layout; can be repeated")
    parser.add_argument(
        "--profile", action="store_true", help="kernels of one more step, in the JSON file"
    )
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(json.loads(options.work), options.out)
    results = []
    for case in cases(options.tiny):
        wanted = options.only in ("", case["kind"]) and options.stage in ("", case["stage"])
        if wanted and (not options.layout or case["layout"] in options.layout):
            results.append(run_case({**case, "profile": options.profile}))
            print(
                json.dumps(
                    {
                        key: results[-1].get(key)
                        for key in (
                            "kind",
                            "stage",
                            "layout",
                            "seq_length",
                            "seconds",
                            "losses",
                            "failed",
                        )  # fmt: skip
                    }
                ),
                flush=True,
            )
    report(results, table, options.out, "parallel")


if __name__ == "__main__":
    main()
