import torch

from megatron_hypenet.ops.decay import log_decay
from megatron_hypenet.ops.lightning_attn import (
    lightning_attn,
    lightning_state,
    naive_lightning_attn,
)


def test_the_front_on_the_cpu_is_exact_in_float64():
    q, k, v = torch.randn(3, 2, 70, 3, 4).double().unbind(0)
    state = torch.randn(2, 3, 4, 4).double()
    ids = torch.tensor([[0] * 30 + [1] * 40, [0] * 70], dtype=torch.int32)
    want, want_final = naive_lightning_attn(
        q, k, v, log_decay(3), scale=0.5, initial_state=state, document_ids=ids
    )
    got, got_final = lightning_attn(
        q, k, v, log_decay(3), scale=0.5, initial_state=state, document_ids=ids
    )
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got_final, want_final, rtol=1e-10, atol=1e-12)
    _, alone = naive_lightning_attn(q, k, v, log_decay(3), scale=0.5, document_ids=ids)
    torch.testing.assert_close(
        lightning_state(k, v, log_decay(3), document_ids=ids), alone, rtol=1e-10, atol=1e-12
    )


def test_the_state_is_fp32_for_narrow_inputs():
    q = torch.randn(1, 9, 2, 4).bfloat16()
    o, state = lightning_attn(q, q, q, log_decay(2), scale=1.0)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert lightning_state(q, q, log_decay(2)).dtype == torch.float32
