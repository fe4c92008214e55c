"""Small Hugging Face folders with random weights, written from scratch so that each test can break
one thing."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.export import hf_config, mapping

TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "<end>": 2}, "unk_token": "a"},
    }
)
"""A small tokenizer.json."""


@dataclass
class HfModel:
    """An HF folder in memory; `write` puts it on disk, whatever was changed before."""

    model: ModelConfig
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    files: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path, *, shards: int = 1) -> Path:
        """Write config.json, weights (with an index when `shards` > 1) and the other files; returns
        the folder."""
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        for name, text in self.files.items():
            (folder / name).write_text(text)
        if shards == 1:
            save_file(self.tensors, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        weight_map = {
            name: f"model-{1 + i % shards:05d}-of-{shards:05d}.safetensors"
            for i, name in enumerate(self.tensors)
        }
        for file in set(weight_map.values()):
            save_file(
                {name: self.tensors[name] for name in weight_map if weight_map[name] == file},
                folder / file,
            )
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
        return folder


def model_config(*, student: bool = False, **changes: Any) -> ModelConfig:
    """Return a model of three layers; the student has Lightning, softmax, Lightning."""
    sizes = dict(
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        vocab_size=67,
    )
    fields = dict(
        **sizes,
        num_layers=3,
        share_embeddings_and_output_weights=True,
        mixer_types=("attn",) * 3,
        attn_use_rope=True,
        attn_use_output_gate=False,
        eos_token_id=2,
    )
    config = ModelConfig(**fields)
    config = config.with_mixers(("lightning_attn", "attn", "lightning_attn")) if student else config
    return config.replace(**changes)


@pytest.fixture
def hf_model() -> Callable[..., HfModel]:
    """Provide a builder: hf_model(student=..., <ModelConfig changes>) -> HfModel with random fp32
    weights."""

    def build(*, student: bool = False, **changes: Any) -> HfModel:
        config = model_config(student=student, **changes)
        generator = torch.Generator().manual_seed(7)
        tensors = {
            name: torch.randn(entry.part_shape, generator=generator) * 0.2
            + (len(entry.part_shape) == 1)
            for entry in mapping.entries(config)
            for name in entry.hf
        }
        return HfModel(
            config, hf_config.hf_config_from_model(config, torch_dtype="float32"), tensors
        )

    return build
