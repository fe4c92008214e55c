"""FLOP formulas against torch's own count of a small model, and against the published sizes."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.model.flops import (
    forward_flops,
    head_flops,
    mixer_flops,
    mlp_flops,
    training_flops,
)
from megatron_hypenet.model.hypenet import build_model
from tests.tiny import tiny_model_config

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


def test_a_backward_pass_costs_two_forward_passes():
    config = tiny_model_config(("lightning_attn", "attn"))
    assert training_flops(config, T) == 3 * forward_flops(config, T)
