"""FLOP formulas against torch's own count of a small model, and against the published sizes."""

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.model.flops import (
    align_flops,
    distill_flops,
    finetune_flops,
    forward_flops,
    head_flops,
    mixer_flops,
    mlp_flops,
)
from megatron_hypenet.model.hypenet import build_model
from tests.tiny import tiny_model_config, tiny_teacher_config

T = 128


@pytest.mark.parametrize(
    "mixers", [("lightning_attn",) * 2, ("attn",) * 2, ("lightning_attn", "attn", "lightning_attn")]
)
def test_formula_against_counted_products(mixers):
    config = tiny_model_config(mixers)
    model = build_model(config, ParallelConfig(), dtype=torch.float32, seed=0)
    # attention as plain products, which torch counts on every device
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, T, dtype=torch.long))
    counted = counter.get_total_flops()
    # torch counts the whole square of softmax attention, and every chunk of Lightning Attention
    # with both triangles
    whole_squares = sum(2.0 * config.query_size * T * T for name in mixers if name == "attn")
    chunks = sum(
        2.0 * 64 * config.kv_channels * config.num_attention_heads * T
        for name in mixers
        if name == "lightning_attn"
    )
    assert counted == pytest.approx(forward_flops(config, T) * T + whole_squares + chunks, rel=1e-6)


def test_a_model_is_the_sum_of_its_parts():
    config = tiny_model_config(("lightning_attn", "attn"))
    assert forward_flops(config, T) == sum(mixer_flops(config, T)) + 2 * mlp_flops(
        config
    ) + head_flops(config)
    lightning = config.spec("lightning_attn")
    assert lightning.flops(config, T) == lightning.flops(config, 100 * T)


def test_stages():
    teacher = tiny_teacher_config(3)
    student = tiny_model_config(("lightning_attn", "attn", "lightning_attn"))
    assert finetune_flops(student, T) == 3 * forward_flops(student, T)
    assert distill_flops(teacher, student, T) == forward_flops(teacher, T) + finetune_flops(
        student, T
    )
    every = student.with_mixers(("lightning_attn",) * 3)
    assert align_flops(teacher, every, T) < sum(mixer_flops(teacher, T)) + 2 * mlp_flops(
        teacher
    ) + 3 * sum(mixer_flops(every, T))


@pytest.mark.parametrize(
    ("size", "expected"),
    [("2b", (5.5, 15.2, 13.1)), ("5b", (15.9, 37.5, 32.8)), ("9b", (27.4, 68.7, 57.0))],
)
def test_published_sizes(repo_root, size, expected):
    """GFLOP per token of the three stages at 512, 512 and 16,384 tokens, worked out by hand from
    the layer formulas."""
    student = ModelConfig.model_validate(
        yaml.safe_load((repo_root / f"configs/model/hypenet_{size}.yaml").read_text())
    )
    layers = student.num_layers
    teacher = student.replace(
        mixer_types=("attn",) * layers, attn_use_rope=True, attn_use_output_gate=False
    )
    every = student.with_mixers(("lightning_attn",) * layers)
    got = (
        align_flops(teacher, every, 512),
        distill_flops(teacher, student, 512),
        finetune_flops(student, 16384),
    )
    assert [value / 1e9 for value in got] == pytest.approx(expected, rel=0.01)
