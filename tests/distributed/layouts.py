"""Tiny real runs on any layout, for the parity tests: the same checkpoints, tokens and settings,
whatever splits the work."""

import os
import subprocess
import sys
from pathlib import Path

import torch

import megatron_hypenet
from megatron_hypenet.checkpoint.save import write_weights
from megatron_hypenet.config.mixers import with_settings
from megatron_hypenet.config.schema import RunConfig
from megatron_hypenet.export.mapping import entries
from megatron_hypenet.model.transfer import named_normal
from tests.tiny import tiny_model_config, tiny_teacher_config

ROOT = Path(megatron_hypenet.__file__).parents[1]
SHAPE = {
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 64,
    "share_embeddings_and_output_weights": True,
}
"""Divisible by two tensor-parallel ranks; embedding and head are one matrix, as in the smaller
Qwen3 models."""
TEACHER = tiny_teacher_config(5, **SHAPE)
STUDENT = tiny_model_config(
    ("lightning_attn", "attn", "lightning_attn", "lightning_attn", "attn"), **SHAPE
)
STAGES = ("align", "distill", "finetune")


def write_models(
    folder: Path, mixer: str | None = None, settings: dict | None = None, **changes: object
) -> None:
    """Write teacher and student checkpoints whose every tensor is a function of its name; `mixer`
    in place of the default one, and `changes` of both shapes."""
    teacher, student = (config.replace(**changes) for config in (TEACHER, STUDENT))
    if mixer is not None:
        types = (name if name == "attn" else mixer for name in STUDENT.mixer_types)
        student = student.with_mixers(types, [with_settings(mixer, settings or {})])
    for kind, config in (("teacher", teacher), ("student", student)):
        tensors = {}
        for entry in entries(config):
            shape = tuple(entry.shape)
            shift = 1.0 if "norm" in entry.ours else 0.0
            tensors[entry.ours] = (
                named_normal(
                    entry.ours, shape, std=0.3 if "norm" in entry.ours else 0.15, seed=len(kind)
                )
                + shift
            )
        write_weights(folder / kind, tensors, config, kind=kind)


END_OF_DOCUMENT = 7


class Tokens:
    """Tokens that depend on the sample index alone; one of them ends a document."""

    def __init__(self, answers_below: int | None = None) -> None:
        """With `answers_below`, so many of 11 tokens are answers, others in each sample; else there
        is no such mask."""
        self.answers_below = answers_below

    def batch(self, sample_start: int, count: int, seq_length: int) -> torch.Tensor:
        rows = [
            torch.randint(
                0,
                SHAPE["vocab_size"],
                (seq_length + 1,),
                generator=torch.Generator().manual_seed(1000 + sample_start + row),
            )
            for row in range(count)
        ]
        return torch.stack(rows)

    def answers(self, sample_start: int, count: int, seq_length: int) -> torch.Tensor | None:
        if self.answers_below is None:
            return None
        place = torch.arange(seq_length + 1)
        rows = [(place + 5 * (sample_start + row)) % 11 for row in range(count)]
        return torch.stack(rows) < self.answers_below

    def document_ends(self, tokens: torch.Tensor, sample_start: int) -> torch.Tensor:
        return tokens == END_OF_DOCUMENT


def run_config(
    out: Path,
    stage_changes: dict | None = None,
    head_changes: dict | None = None,
    align_changes: dict | None = None,
    **changes,
) -> RunConfig:
    """Return a run of five steps of four samples, one per micro-batch, with clipping that takes
    effect."""
    stage = {
        "train_iters": 5,
        "seq_length": 16,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "lr": 1e-2,
        "min_lr": 1e-3,
        "clip_grad": 0.5,
        "warmup_iters": 1,
        "save_interval": 100,
        "log_interval": 1,
        "weight_decay": 0.1,
        **(stage_changes or {}),
    }
    align = {**stage, **(align_changes or {})}
    head = {**stage, "vocab_chunk_tokens": 7, **(head_changes or {})}
    # an objective is for both stages that can have a teacher
    finetune = {**head, "teacher_weight": 0.4} if "objective" in head else head
    inputs = {
        "output_dir": str(out),
        "teacher": "teacher",
        "data": {"train": ["x.txt"]},
        "precision": "float32",
    }
    return RunConfig.model_validate(
        {**inputs, "align": align, "distill": head, "finetune": finetune, **changes}
    )


def start(
    processes: int,
    *arguments: str,
    module: str = "tests.distributed.layout_worker",
    timeout: int = 600,
):
    """Run a worker module in `processes` fresh processes; returns the finished subprocess."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "-m",
        module,
    ]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    return subprocess.run(
        [*launcher, *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
