"""A whole run small enough for a test: a random Qwen3 folder, a configuration, and made-up token
sequences in the place of text."""

import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.export.hf_config import hf_config_from_model
from megatron_hypenet.export.mapping import entries
from megatron_hypenet.halo import datasets
from megatron_hypenet.halo.evaluation import Measure
from tests.tiny import tiny_teacher_config

TEACHER = tiny_teacher_config(3)
STAGE = {
    "train_iters": 2,
    "seq_length": 16,
    "micro_batch_size": 1,
    "global_batch_size": 2,
    "lr": 1e-3,
    "min_lr": 1e-4,
    "log_interval": 1,
    "save_interval": 1,
}


def write_teacher(folder: Path, seed: int = 0, shape: ModelConfig = TEACHER) -> Path:
    """Write a random Qwen3 folder without tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    tensors = {}
    for entry in entries(shape):
        for name in entry.hf:
            values = torch.randn(entry.part_shape, generator=generator) * 0.1
            tensors[name] = values + 1.0 if "norm" in name else values
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps(hf_config_from_model(shape, torch_dtype="float32", origin=None))
    )
    return folder


def write_config(root: Path, **changes) -> Path:
    """Write a run configuration whose teacher lies at root/qwen3, with results in root/run."""
    text = root / "text.txt"
    text.write_text("some text\n")
    values = {
        "output_dir": str(root / "run"),
        "teacher": str(root / "qwen3"),
        "data": {"train": [str(text)]},
        "device": "cpu",
        "precision": "float32",
        "align": STAGE,
        "distill": STAGE,
        "finetune": STAGE,
        "select": {
            "recall_sequences": 2,
            "recall_pairs": 2,
            "heldout_sequences": 2,
            "seq_length": 16,
            "batch_size": 2,
        },
        "eval": {
            "recall_sequences": 2,
            "recall_pairs": 2,
            "heldout_sequences": 2,
            "seq_length": 16,
            "batch_size": 2,
            "length_multiples": [1, 2],
        },
        "guard": {"max_teacher_loss": 100.0},
    }
    path = root / "run.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


class Sequences:
    """Tokens that go up by three: a pure function of the sample index, as training data must be."""

    def answers(self, sample_start, count, seq_length):
        return None

    def predicted(self, sample_start, count, seq_length):
        return torch.ones(count, seq_length, dtype=torch.bool)

    def batch(self, sample_start: int, count: int, seq_length: int) -> torch.Tensor:
        """Return samples sample_start .. + count - 1."""
        return (
            torch.arange(sample_start, sample_start + count)[:, None]
            + 3 * torch.arange(seq_length + 1)
        ) % TEACHER.vocab_size


def fake_material(monkeypatch) -> None:
    """Put made-up sequences and measurements in the place of prepared text; models are still
    run."""

    def prepare(run, folder, log):
        folder.data.mkdir()
        return {}

    def measured(run, folder):
        return Measure(
            run=run,
            task=lambda pairs: None,
            heldout=lambda count, length: Sequences().batch(1000, count, length),
        )

    monkeypatch.setattr(datasets, "prepare", prepare)
    monkeypatch.setattr(datasets, "check_lengths", lambda run, folder: None)
    monkeypatch.setattr(datasets, "training_data", lambda run, folder: Sequences())
    monkeypatch.setattr(datasets, "selection_samples", lambda run, folder: Sequences())
    monkeypatch.setattr(datasets, "measure", measured)
    monkeypatch.setattr(
        "megatron_hypenet.halo.evaluation.recall_accuracy", lambda scores, task, **kwargs: 50.0
    )
