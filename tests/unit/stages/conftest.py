"""Tiny random teachers and students in float64."""

import pytest
import torch

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.model.hypenet import build_model
from megatron_hypenet.stages.base import MicroBatch

TEACHER = ModelConfig(
    num_layers=3,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=50,
    rotary_base=1e4,
    share_embeddings_and_output_weights=False,
    mixer_types=("attn",) * 3,
    attn_use_rope=True,
    attn_use_output_gate=False,
    init_method_std=0.2,  # large enough for the layers to matter
)
STUDENT = TEACHER.with_mixers(("lightning_attn", "attn", "lightning_attn"))


def build(config, *, seed=0, **kwargs):
    """Build a model in float64 with random weights."""
    return build_model(config, ParallelConfig(), dtype=torch.float64, seed=seed, **kwargs)


@pytest.fixture
def teacher():
    """Provide a whole teacher."""
    return build(TEACHER)


@pytest.fixture
def student():
    """Provide a student with one softmax layer."""
    return build(STUDENT, seed=1)


@pytest.fixture
def batch():
    """Provide two sequences of 11 input tokens and the one that follows."""
    return MicroBatch(
        torch.randint(0, TEACHER.vocab_size, (2, 12), generator=torch.Generator().manual_seed(5))
    )
