"""Against the written formulas (HypeNet reference, mixer kda) over the naive recurrence."""

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_hypenet.config.mixers.kimi_delta_attention import KimiDeltaAttentionSpec
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.model.hypenet import build_model
from megatron_hypenet.ops.gated_delta_rule import naive_gated_delta_rule
from megatron_hypenet.ops.rope import apply_rope
from tests.tiny import tiny_model_config
from tests.unit.model.mixers.test_gated_delta_net import rms, unit

NAME = "kimi_delta_attention"


def mixer_of(spec):
    config = tiny_model_config((NAME,)).with_mixers((NAME,), (spec,))
    return build_model(config, ParallelConfig(), dtype=torch.float64, seed=1).mixer(0)


def convolved(x, weight):
    padded = F.pad(x.permute(1, 2, 0), (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], groups=len(weight))).permute(2, 0, 1)


@pytest.mark.parametrize(
    "spec",
    [
        KimiDeltaAttentionSpec(),
        KimiDeltaAttentionSpec(conv=True, conv_size=4),
        KimiDeltaAttentionSpec(qk_norm=False, rope=False),
    ],
    ids=["default", "conv", "no norm, no rope"],
)
def test_forward_is_the_written_formula(spec):
    mixer = mixer_of(spec)
    x = torch.randn(40, 2, 24, dtype=torch.float64)
    angles = torch.randn(40, 1, 1, 8, dtype=torch.float64)
    project = {name: F.linear(x, mixer.section_weight(name)) for name in mixer.local_sections}
    parts = [project[name] for name in "qkv"]
    if spec.conv:
        parts = [
            convolved(part, getattr(mixer, f"{name}_conv"))
            for name, part in zip("qkv", parts, strict=True)
        ]
    q, k, v = (part.unflatten(-1, (-1, 8)) for part in parts)
    if spec.qk_norm:
        q, k = rms(q), rms(k)
    if spec.rope:
        q, k = apply_rope(q, angles), apply_rope(k, angles)
    step = F.softplus(project["decay_down"] @ mixer.decay_up.t() + mixer.dt_bias)
    decay = -mixer.A_log.exp()[:, None] * step.unflatten(-1, (6, 8))
    beta = torch.sigmoid(project["beta"])
    o, _ = naive_gated_delta_rule(
        *(part.transpose(0, 1) for part in (unit(q), unit(k), v, decay, beta)),
        scale=1 / math.sqrt(8),
    )
    gate = torch.sigmoid(project["gate_down"] @ mixer.gate_up.t())
    want = (rms(o.transpose(0, 1)).flatten(-2) * gate) @ mixer.linear_proj.weight.t()
    torch.testing.assert_close(mixer(x, rotary_pos_emb=angles)[0], want)
