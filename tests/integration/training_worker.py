"""One training process for the tests of faults and resumes: a tiny real stage, hurt where asked.

    python -m tests.integration.training_worker OUT --iters 6 --stage finetune [--zero 2]
        [--dtype bfloat16] [--kill-after 4] ...
Run alone, by torchrun or by launchers/local.py for several data-parallel processes. --kill-after,
--stop-after, --fail-after, --term-after and --slow concern all processes, or the one named by
--only-rank.
"""

import argparse
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from megatron_hypenet.checkpoint import shard_writer
from megatron_hypenet.checkpoint.format import iteration_name
from megatron_hypenet.cli.main import report_fault
from megatron_hypenet.config.mixers import default_mixer
from megatron_hypenet.config.schema import RunConfig
from megatron_hypenet.model.hypenet import build_model
from megatron_hypenet.parallel import groups
from megatron_hypenet.stages.align import AlignStage
from megatron_hypenet.stages.aligned_mixers import AlignedMixers
from megatron_hypenet.stages.distill import DistillStage
from megatron_hypenet.stages.finetune import FinetuneStage
from megatron_hypenet.supervision.faults import watched
from megatron_hypenet.supervision.hang_watchdog import collective_minutes
from megatron_hypenet.supervision.process_exit import exit_process
from megatron_hypenet.training.loop import train
from tests.tiny import tiny_model_config, tiny_teacher_config

SHAPE = {"num_attention_heads": 4, "num_query_groups": 2, "vocab_size": 62}
"""Divisible by two tensor-parallel ranks."""


BAD_TOKEN = 61


class RandomTokens:
    """Tokens that depend on the sample index alone; those of bad samples begin with BAD_TOKEN."""

    def __init__(self, bad=range(0), fails=lambda: False):
        self.bad = bad
        self.fails = fails

    def answers(self, sample_start, count, seq_length):
        return None

    def batch(self, sample_start: int, count: int, seq_length: int) -> torch.Tensor:
        if self.fails():
            raise ValueError("this shard cannot be read")
        rows = [
            torch.randint(
                0,
                61,
                (seq_length + 1,),
                generator=torch.Generator().manual_seed(1000 + sample_start + row),
            )
            for row in range(count)
        ]
        for row in range(count):
            if sample_start + row in self.bad:
                rows[row][0] = BAD_TOKEN
        return torch.stack(rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--stage", default="finetune", choices=["align", "distill", "finetune"])
    parser.add_argument("--iters", type=int, default=6)
    parser.add_argument("--save-interval", type=int, default=3)
    parser.add_argument("--zero", type=int, default=1)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--cp", type=int, default=1)
    parser.add_argument("--async-save", action="store_true")
    parser.add_argument("--keep-last", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--kill-after", type=int, default=0)
    parser.add_argument("--term-after", type=int, default=0)
    parser.add_argument("--only-rank", type=int)
    parser.add_argument(
        "--stop-after", type=int, default=0, help="SIGSTOP: the process neither ends nor answers"
    )
    parser.add_argument(
        "--fail-after",
        type=int,
        default=0,
        help="an exception while the data of the next step is read",
    )
    parser.add_argument(
        "--fill-disk-after",
        type=int,
        default=0,
        help="the first process leaves no space beside its results",
    )
    parser.add_argument(
        "--slow", type=float, default=0.0, help="seconds that every forward pass takes longer"
    )
    parser.add_argument(
        "--bad-samples",
        type=int,
        nargs=2,
        default=(0, 0),
        help="first, and one beyond the last, whose loss is NaN",
    )
    parser.add_argument("--max-skipped", type=int, default=3)
    parser.add_argument("--hang-timeout", type=float, default=1800.0)
    parser.add_argument(
        "--die-writing",
        type=int,
        default=0,
        help="the last process kills itself while it writes the save of this step",
    )
    return parser.parse_args(arguments)


def run_config(options: argparse.Namespace) -> RunConfig:
    stage = {
        "train_iters": options.iters,
        "seq_length": 16,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "lr": options.lr,
        "min_lr": 1e-3,
        "warmup_iters": 2,
        "save_interval": options.save_interval,
        "log_interval": 2,
        "weight_decay": 0.01,
    }
    parallel = {
        "zero_stage": options.zero,
        "tensor_model_parallel_size": options.tp,
        "pipeline_model_parallel_size": options.pp,
        "context_parallel_size": options.cp,
    }
    inputs = {
        "checkpoint": {"async_save": options.async_save, "keep_last": options.keep_last},
        "guard": {
            "max_skipped_steps": options.max_skipped,
            "hang_timeout_seconds": options.hang_timeout,
        },
        "output_dir": str(options.out),
        "teacher": "teacher",
        "data": {"train": ["x.txt"]},
    }
    return RunConfig.model_validate(
        {
            **inputs,
            "parallel": parallel,
            "precision": options.dtype,
            "align": stage,
            "distill": stage,
            "finetune": stage,
        }
    )


def build(options: argparse.Namespace, run: RunConfig):
    dtype = getattr(torch, options.dtype)
    teacher = tiny_teacher_config(**SHAPE)
    if options.stage == "align":
        trunk = build_model(teacher, run.parallel, dtype=dtype, seed=1, trunk_only=True)
        return AlignStage(trunk, AlignedMixers.from_teacher(trunk, default_mixer(), seed=1))
    student = build_model(tiny_model_config(**SHAPE), run.parallel, dtype=dtype, seed=2)
    if options.stage == "distill":
        return DistillStage(
            student, build_model(teacher, run.parallel, dtype=dtype, seed=1), chunk_tokens=8
        )
    return FinetuneStage(student, chunk_tokens=8)


def die_writing(step: int) -> None:
    """Let the last process kill itself, from now on, between two tensors of the save of `step`."""
    write = shard_writer.ShardWrite.write

    def dying(self, **options):
        if iteration_name(step) in str(self.folder) and groups.rank() == groups.world_size() - 1:
            pieces = iter([False])
            options["cancelled"] = lambda: (
                next(pieces, None) is None and os.kill(os.getpid(), signal.SIGKILL)
            )
        return write(self, **options)

    shard_writer.ShardWrite.write = dying


def hurt(stage, options: argparse.Namespace, mine: bool) -> None:
    """Give the stage a loss that is NaN for bad samples, and a forward pass that is slow."""
    head_loss = stage.head_loss

    def hurting(tokens, hidden, teacher_hidden):
        time.sleep(options.slow if mine else 0.0)
        loss, metrics = head_loss(tokens, hidden, teacher_hidden)
        return (loss * float("nan") if (tokens.inputs == BAD_TOKEN).any() else loss), metrics

    stage.head_loss = hurting


def fill_disk(folder: Path) -> None:
    """Write until nothing fits any more."""
    with suppress(OSError), (folder / "filler").open("wb", buffering=0) as stream:
        while stream.write(b"x" * 4096):
            pass


def train_stage(options: argparse.Namespace, run: RunConfig) -> Path:
    mine = options.only_rank in (None, groups.rank())
    done = 0

    def on_step(record) -> None:
        nonlocal done
        done = record.step
        sys.stderr.flush()
        if mine and record.step == options.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if mine and record.step == options.stop_after:
            os.kill(os.getpid(), signal.SIGSTOP)
        if mine and record.step == options.term_after:
            os.kill(os.getpid(), signal.SIGTERM)
        if record.step == options.fill_disk_after and groups.rank() == 0:
            fill_disk(options.out)

    stage = build(options, run)
    if options.stage != "align":
        hurt(stage, options, mine)
    data = RandomTokens(
        range(*options.bad_samples),
        lambda: mine and options.fail_after and done == options.fail_after,
    )
    return train(
        stage,
        data,
        run.finetune,
        run,
        options.out / options.stage,
        on_step=on_step,
    )


def main(options: argparse.Namespace) -> None:
    run = run_config(options)
    groups.init_parallel(run.parallel, seed=3, collective_minutes=collective_minutes(run.guard))
    if options.die_writing:
        die_writing(options.die_writing)
    with watched(options.out, run.guard):
        final = train_stage(options, run)
    if groups.rank() == 0:
        print(final, flush=True)


if __name__ == "__main__":
    code = 0
    try:
        main(parse())
    except Exception as fault:
        code = report_fault(fault, debug=False)
    exit_process(code)
