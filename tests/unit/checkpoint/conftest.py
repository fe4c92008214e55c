"""A tiny model configuration, tensors, and a model whose sharded state dict has a plain, a fused
and a stacked entry."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from megatron_hypenet.checkpoint import save
from megatron_hypenet.checkpoint.format import OPTIMIZER_STATES, iteration_name
from megatron_hypenet.config.model import ModelConfig


@pytest.fixture
def model_config() -> ModelConfig:
    """Provide a model of two softmax layers."""
    return ModelConfig(
        num_layers=2,
        hidden_size=8,
        ffn_hidden_size=16,
        num_attention_heads=2,
        num_query_groups=1,
        kv_channels=4,
        vocab_size=11,
        share_embeddings_and_output_weights=True,
        mixer_types=("attn", "attn"),
        attn_use_rope=True,
        attn_use_output_gate=False,
    )


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """Provide what FusedModel stores: different dtypes, one and two dimensions."""
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(11, 8, generator=generator),
        "linear.weight.q": torch.randn(4, 8, generator=generator),
        "linear.weight.k": torch.randn(2, 8, generator=generator),
        "norm.weight": torch.randn(8, generator=generator).to(torch.bfloat16),
    }


@pytest.fixture
def run(tmp_path, tensors, model_config):
    """Provide a folder with two checkpoints of weights, of steps 10 and 20."""
    for step in (10, 20):
        folder = tmp_path / "run" / "checkpoints" / iteration_name(step)
        save.write_weights(folder, tensors, model_config, kind="student")
    return tmp_path / "run"


class FusedModel(torch.nn.Module):
    """embed (plain), linear (q and k fused in one parameter, stored apart), norm (bf16)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Parameter(torch.zeros(11, 8))
        self.linear = torch.nn.Parameter(torch.zeros(6, 8))
        self.norm = torch.nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))

    def sharded_state_dict(self, prefix: str = "") -> dict:
        """Return the Megatron sharded state dict of one process."""
        from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

        def whole(key: str, data: torch.Tensor) -> ShardedTensor:
            return ShardedTensor.from_rank_offsets(key, data)

        def build(key: str, data: torch.Tensor, replica_id, flattened_range) -> dict:
            return {
                "q": replace(whole(f"{key}.q", data[:4]), replica_id=replica_id),
                "k": replace(whole(f"{key}.k", data[4:]), replica_id=replica_id),
            }

        fused = ShardedTensorFactory(
            "linear.weight",
            self.linear,
            build,
            lambda parts: torch.cat([parts["q"], parts["k"]]),
            0,
        )
        return {
            f"{prefix}embed.weight": whole("embed.weight", self.embed),
            f"{prefix}linear.weight": fused,
            f"{prefix}norm.weight": whole("norm.weight", self.norm),
        }


@pytest.fixture
def fused_model() -> FusedModel:
    """Provide a model whose weights are all zero."""
    return FusedModel()


class MemoryEngine:
    """An EngineState without DeepSpeed: Adam state in a dictionary; one process."""

    data_rank = 0
    data_size = 1

    def __init__(self, module: FusedModel) -> None:
        from megatron_hypenet.checkpoint.state import Template

        self.module = module
        self.template = Template(module)
        self.steps = 0
        self.states: dict[tuple[int, str], torch.Tensor] = {}

    def randomize(self, seed: int) -> MemoryEngine:
        """Give every element a value of its own."""
        generator = torch.Generator().manual_seed(seed)
        self.init_optimizer_state(7)
        for entry in self.template:
            entry.parameter.data.copy_(torch.randn(entry.shape, generator=generator))
            for name in OPTIMIZER_STATES:
                self.states[entry.index, name] = torch.randn(entry.shape, generator=generator)
        return self

    def init_optimizer_state(self, adam_step: int) -> None:
        self.steps = adam_step

    def adam_step(self) -> int:
        return self.steps

    def gathered(self, parameter):
        return nullcontext()

    def set_weight(self, parameter, value) -> None:
        parameter.data.copy_(value)

    def _key(self, parameter, name):
        return next(entry.index for entry in self.template if entry.parameter is parameter), name

    def full_state(self, parameter, name) -> torch.Tensor:
        return self.states[self._key(parameter, name)]

    def set_full_state(self, parameter, name, value) -> None:
        self.states[self._key(parameter, name)] = value.clone()


@pytest.fixture
def make_engine():
    """Provide a function that builds a MemoryEngine around a fresh FusedModel."""
    return lambda: MemoryEngine(FusedModel())
