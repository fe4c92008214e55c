import math

import pytest
import torch

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.model.hypenet import build_model
from megatron_hypenet.ops import lightning_mix
from megatron_hypenet.ops.decay import alibi_slopes
from megatron_hypenet.ops.lightning_attn import naive_lightning_attn
from megatron_hypenet.ops.rope import apply_rope
from tests.tiny import tiny_model_config, tiny_teacher_config


def mixer_of(config, dtype=torch.float64):
    return build_model(config, ParallelConfig(), dtype=dtype, seed=1).mixer(0)


def test_forward_is_the_written_formula_over_the_naive_recurrence():
    mixer = mixer_of(tiny_model_config(("lightning_attn",)))
    x = torch.randn(70, 2, 24, dtype=torch.float64)
    angles = torch.randn(70, 1, 1, 8, dtype=torch.float64)
    q, k, v, z = (
        torch.nn.functional.linear(x, mixer.section_weight(name))
        for name in ("q", "k", "v", "gate")
    )
    rms = lambda t: t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    q, k = (apply_rope(rms(t.unflatten(-1, (6, 8))), angles).transpose(0, 1) for t in (q, k))
    o, _ = naive_lightning_attn(
        q, k, v.unflatten(-1, (6, 8)).transpose(0, 1), -alibi_slopes(6), scale=1 / math.sqrt(8)
    )
    want = (rms(o.transpose(0, 1).flatten(-2)) * torch.sigmoid(z)) @ mixer.linear_proj.weight.t()
    torch.testing.assert_close(mixer(x, rotary_pos_emb=angles)[0], want)


def test_casting_the_model_to_bf16_leaves_the_decays_exact():
    mixer = mixer_of(tiny_model_config(("lightning_attn",)), torch.bfloat16).bfloat16()
    assert torch.equal(mixer.log_decay, -alibi_slopes(6))


def test_weight_transfer_takes_attention_apart_head_by_head():
    attention = mixer_of(tiny_teacher_config(1))
    lightning = mixer_of(tiny_model_config(("lightning_attn",)))
    torch.nn.init.normal_(attention.q_norm.weight)
    lightning.init_from_attention(attention, seed=5)
    assert torch.equal(lightning.section_weight("q"), attention.section_weight("q"))
    for head in range(6):
        for name in ("k", "v"):
            mine = lightning.section_weight(name)[head * 8 : head * 8 + 8]
            assert torch.equal(
                mine, attention.section_weight(name)[head // 2 * 8 : head // 2 * 8 + 8]
            )
    assert torch.equal(lightning.q_norm.weight, attention.q_norm.weight)
    assert torch.equal(lightning.linear_proj.weight, attention.linear_proj.weight)
    assert torch.equal(lightning.o_norm.weight, torch.ones(48, dtype=torch.float64))
    gate = lightning.section_weight("gate").clone()
    assert 0.01 < gate.std() < 0.03
    again = mixer_of(tiny_model_config(("lightning_attn",))).init_from_attention(attention, seed=5)
    assert torch.equal(again.section_weight("gate"), gate)


def test_weights_come_from_softmax_attention_only():
    lightning = mixer_of(tiny_model_config(("lightning_attn",)))
    with pytest.raises(TypeError, match="LightningAttn"):
        lightning.init_from_attention(lightning, seed=1)


@pytest.mark.parametrize("documents", [False, True])
def test_one_node_gives_what_the_steps_give(monkeypatch, documents):
    """The two are compared as on a GPU, with the kernels in Triton's interpreter where there is
    none."""
    pytest.importorskip("triton")
    mixer = mixer_of(tiny_model_config(("lightning_attn",), kv_channels=32), torch.float32)
    where = mixer.linear_in.weight.device
    x, dy = torch.randn(70, 2, 24, device=where), torch.randn(70, 2, 24, device=where)
    half = torch.randn(70, 1, 1, 16, device=where)
    angles = torch.cat((half, half), -1)
    ids = (torch.arange(70, device=where) // 30).int().expand(2, 70) if documents else None
    found = []
    for one_node in (True, False):
        monkeypatch.setattr(lightning_mix, "fits", lambda *_, one_node=one_node, **__: one_node)
        inputs = [x.clone().requires_grad_(), *mixer.parameters()]
        y, _ = mixer(inputs[0], rotary_pos_emb=angles, packed_seq_params=ids)
        found.append([y.detach(), *torch.autograd.grad(y, inputs, dy)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
