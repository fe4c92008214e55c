"""A tiny model configuration, tensors, and a model whose sharded state dict has a plain, a fused and a stacked entry."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_hypenet.config.model import ModelConfig


@pytest.fixture
def model_config() -> ModelConfig:
    """Two softmax layers."""
    return ModelConfig(
        num_layers=2, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2, num_query_groups=1, kv_channels=4, vocab_size=11,
        share_embeddings_and_output_weights=True, mixer_types=("attn", "attn"), attn_use_rope=True, attn_use_output_gate=False,
    )  # fmt: skip


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """What FusedModel stores: different dtypes, one and two dimensions."""
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(11, 8, generator=generator),
        "linear.weight.q": torch.randn(4, 8, generator=generator),
        "linear.weight.k": torch.randn(2, 8, generator=generator),
        "norm.weight": torch.randn(8, generator=generator).to(torch.bfloat16),
    }


class FusedModel(torch.nn.Module):
    """embed (plain), linear (q and k fused in one parameter, stored apart), norm (bf16)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Parameter(torch.zeros(11, 8))
        self.linear = torch.nn.Parameter(torch.zeros(6, 8))
        self.norm = torch.nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))

    def sharded_state_dict(self, prefix: str = "") -> dict:
        """Megatron sharded state dict of one process."""
        from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

        def whole(key: str, data: torch.Tensor) -> ShardedTensor:
            return ShardedTensor.from_rank_offsets(key, data)

        def build(key: str, data: torch.Tensor, replica_id, flattened_range) -> dict:
            return {
                "q": replace(whole(f"{key}.q", data[:4]), replica_id=replica_id),
                "k": replace(whole(f"{key}.k", data[4:]), replica_id=replica_id),
            }

        fused = ShardedTensorFactory("linear.weight", self.linear, build, lambda parts: torch.cat([parts["q"], parts["k"]]), 0)
        return {
            f"{prefix}embed.weight": whole("embed.weight", self.embed),
            f"{prefix}linear.weight": fused,
            f"{prefix}norm.weight": whole("norm.weight", self.norm),
        }


@pytest.fixture
def fused_model() -> FusedModel:
    """All zeros."""
    return FusedModel()
