"""What a run is about to compute and where, in a few lines before it begins.

Not a verb: every command that works on a run says it.
"""

from __future__ import annotations

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import STAGES, ParallelConfig, RunConfig


def banner(run: RunConfig, teacher: ModelConfig, num_processes: int) -> list[str]:
    """Return lines with device, precision, processes, sizes, tokens, and the disk that the run
    takes beside the disk that is there; the device is that of this process."""
    from megatron_hypenet.byte_sizes import size_text
    from megatron_hypenet.halo.build_stage import compute_dtype
    from megatron_hypenet.planning.disk import disk_need, free_bytes, text_bytes

    dtype = str(compute_dtype(run)).removeprefix("torch.")
    lines = [f"{device_name(num_processes)}, {dtype}; {layout_words(run, num_processes)}"]
    student = teacher.converted(run.align.spec)
    lines.append(
        f"teacher {short(teacher.num_parameters)} parameters, {teacher.num_layers} layers; with "
        f"{run.align.mixer} in all of them {short(student.num_parameters)}"
    )
    total = 0
    for name in STAGES:
        stage = run.stage(name)
        total += stage.tokens_per_step * stage.train_iters
        lines.append(
            f"{name:<9}{stage.global_batch_size} x {stage.seq_length} = "
            f"{stage.tokens_per_step:,} tokens a step, {stage.train_iters:,} steps, "
            f"{short(stage.tokens_per_step * stage.train_iters)} tokens"
        )
    need = disk_need(teacher, run, text_bytes=text_bytes(run)).peak
    there = free_bytes(run.output_dir)
    lines.append(
        f"{short(total)} tokens in all; takes up to {size_text(need)} in {run.output_dir}, where "
        f"{size_text(there)} are free"
    )
    if there < need:
        lines.append(
            f"warning: the disk may become full; `hypenet plan {run.output_dir / 'config.yaml'}` "
            "says what takes how much, checkpoint.finished=weights saves most"
        )
    return lines


def device_name(num_processes: int) -> str:
    """Return the kind of device and how many are used, e.g. "8 x NVIDIA H100 80GB HBM3"."""
    import torch

    from megatron_hypenet.parallel.cpu import device

    if device().type == "cuda":
        return f"{num_processes} x {torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''} a process"


def layout_words(run: RunConfig, num_processes: int) -> str:
    """Return the number of processes and the axes that they share the work by."""
    parallel: ParallelConfig = run.parallel
    axes = {
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "chunks per stage": parallel.virtual_pipeline_model_parallel_size,
        "context": parallel.context_parallel_size,
        "data": num_processes // parallel.model_parallel_size,
    }
    used = ", ".join(f"{axis} {size}" for axis, size in axes.items() if size > 1)
    noun = "process" if num_processes == 1 else "processes"
    return f"{num_processes} {noun}{f' ({used})' if used else ''}, ZeRO {parallel.zero_stage}"


def short(value: float) -> str:
    """Return a count with three digits: 1.72 B."""
    for limit, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.0f}"
