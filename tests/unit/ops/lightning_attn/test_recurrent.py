import torch

from megatron_hypenet.ops.decay import log_decay
from megatron_hypenet.ops.lightning_attn import naive_lightning_attn, recurrent_lightning_attn_step


def test_steps_reproduce_the_sequence():
    q, k, v = torch.randn(3, 2, 7, 5, 4).double().unbind(0)
    want, final = naive_lightning_attn(q, k, v, log_decay(5), scale=0.3)
    state = torch.zeros(2, 5, 4, 4, dtype=torch.float64)
    for i in range(7):
        o, state = recurrent_lightning_attn_step(
            q[:, i], k[:, i], v[:, i], log_decay(5), state, scale=0.3
        )
        torch.testing.assert_close(o, want[:, i])
    torch.testing.assert_close(state, final)


def test_bf16_tokens_meet_an_fp32_state():
    q, k, v = torch.randn(3, 1, 2, 4).bfloat16().unbind(0)
    o, state = recurrent_lightning_attn_step(
        q, k, v, log_decay(2), torch.zeros(1, 2, 4, 4), scale=1.0
    )
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
