"""A layout of processes, measured: what the benchmarks of several GPUs share.

A case is one layout in processes of its own. It is a dictionary of JSON, so that it can travel to
them as a word of their command line; `case` lists its entries."""

from __future__ import annotations

import gc
import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fresh_process import Row, measured

TP = "tensor_model_parallel_size"
PP = "pipeline_model_parallel_size"
CHUNKS = "virtual_pipeline_model_parallel_size"
CP = "context_parallel_size"
SP = "sequence_parallel"
ZERO = "zero_stage"


def case(
    name: str,
    kind: str,
    *,
    layout: str,
    stages: Sequence[str],
    processes: int,
    parallel: Mapping[str, Any],
    seq_length: int,
    global_batch: int,
    steps: int,
    warmup: int,
    model: str = "hypenet_2b",
    layers: int | None = None,
    changes: Mapping[str, Any] | None = None,
    micro_batch: int = 1,
    recompute: str = "none",
    by_name: bool = False,
    baseline: str | None = None,
    goal: float | None = None,
    **more: Any,
) -> Row:
    """Return a case. `parallel` are entries of ParallelConfig. `stages` are measured one behind the
    other in the same processes. `layers` and `changes` of its shape make the model smaller.
    `by_name` draws each weight from its name, the same on every layout. `baseline` is the name of
    the case on one GPU that this one is compared with, and `goal` the share of its efficiency by
    work that it should reach."""
    return {
        "name": name,
        "kind": kind,
        "layout": layout,
        "stages": list(stages),
        "processes": processes,
        "parallel": dict(parallel),
        "seq_length": seq_length,
        "global_batch": global_batch,
        "steps": steps,
        "warmup": warmup,
        "model": model,
        "layers": layers,
        "changes": dict(changes or {}),
        "micro_batch": micro_batch,
        "recompute": recompute,
        "by_name": by_name,
        "baseline": baseline,
        "goal": goal,
        "profile": False,
        **more,
    }


def stage_config(row: Row) -> Any:
    """Return the settings of a stage that a case trains."""
    from megatron_hypenet.config.schema import HeadStageConfig

    return HeadStageConfig(
        train_iters=row["steps"] + row["warmup"],
        seq_length=row["seq_length"],
        micro_batch_size=row["micro_batch"],
        global_batch_size=row["global_batch"],
        lr=1e-5,
        min_lr=1e-5,
        recompute=row["recompute"],
    )


def measure(row: Row, stage_name: str) -> Row:
    """Train one stage of a case in this process, one of the case's; returns what was measured."""
    import torch
    from random_stage import TimedSteps, build, median, model_config

    from megatron_hypenet.config.schema import ParallelConfig
    from megatron_hypenet.parallel import groups
    from megatron_hypenet.training.metrics import memory_gib
    from megatron_hypenet.training.throughput import Workload, peak_flops

    parallel = ParallelConfig.model_validate(row["parallel"])
    config = stage_config(row)
    groups.init_parallel(parallel)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with state_bytes() as exchanged:
        student = model_config(row["model"], num_layers=row["layers"], changes=row["changes"])
        stage = build(stage_name, student, config, parallel, by_name=row["by_name"])
        steps = TimedSteps(stage, config, parallel)
        steps.run(row["warmup"])
        steps.run(row["steps"])
        seconds = steps.seconds
        # without those of the profiled step, so that all layouts have as many
        losses, norms = list(steps.losses), list(steps.norms)
        kernels = busiest_kernels(steps) if row["profile"] else []
    speed = config.tokens_per_step / median(seconds)
    work = Workload(stage.flops_per_token(config), row["processes"], peak_flops())
    found = {
        "losses": losses,
        "grad_norms": norms,
        "seconds": seconds,
        "tokens_per_second": speed,
        "tflops_per_gpu": work.tflops_per_device(speed),
        "mfu": work.mfu(speed),
        "memory_gib": memory_gib(),
        "kernels": kernels,
        "lightning_bytes_per_exchange": max(exchanged, default=0),
        "lightning_exchanges_per_step": len(exchanged) / len(steps.losses),
    }
    steps.close()
    del steps, stage
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def work(row: Row, out: Path) -> None:
    """Run one process of a case; the first writes what was measured of each stage."""
    from megatron_hypenet.parallel import groups
    from megatron_hypenet.supervision.process_exit import exit_process

    found = {name: measure(row, name) for name in row["stages"]}
    if groups.rank() == 0:
        out.write_text(json.dumps({**row, "measured": found, **machine()}))
    exit_process(0)


def machine() -> Row:
    """Return the names of this machine's device and of torch's version."""
    import torch

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "torch": torch.__version__,
    }


@contextmanager
def state_bytes() -> Iterator[list[int]]:
    """Collect, inside the block, the bytes that this process sends in each exchange of RNN states
    over context-parallel processes."""
    from megatron_hypenet.parallel.context.state_exchange import StateTransfer

    sent: list[int] = []
    send = StateTransfer.send

    def counted(transfer: Any, *mine: Any) -> None:
        sent.append(sum(x.numel() * x.element_size() for x in mine) * (transfer.group.size() - 1))
        send(transfer, *mine)

    StateTransfer.send = counted  # type: ignore[method-assign]
    try:
        yield sent
    finally:
        StateTransfer.send = send  # type: ignore[method-assign]


def busiest_kernels(steps: Any, count: int = 40) -> list[Row]:
    """Return what the GPU did during one more step of a `TimedSteps`: milliseconds and launches of
    the kernels that took longest, under the sum of all."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        steps.run(1)
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


def run_case(
    script: str,
    row: Row,
    *,
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> Row:
    """Start the processes of one case, which run `script --work CASE --out FILE`, and wait at most
    `timeout` seconds; what went wrong is part of the result."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={row['processes']}",
        script,
        "--work",
        json.dumps(row),
    ]
    return measured(command, row, timeout=timeout, environment=environment)
