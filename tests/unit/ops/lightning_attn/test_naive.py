import torch

from megatron_hypenet.ops.decay import log_decay
from megatron_hypenet.ops.lightning_attn import naive_lightning_attn


def test_equals_the_masked_quadratic_form():
    b = 2
    t = 9
    h = 3
    k = 4
    v = 5
    q = torch.randn(b, t, h, k).double()
    key = torch.randn(b, t, h, k).double()
    value = torch.randn(b, t, h, v).double()
    decay = log_decay(h)
    distance = torch.arange(t)[:, None] - torch.arange(t)[None, :]
    weights = torch.exp(decay[:, None, None] * distance) * (distance >= 0)
    want = torch.einsum("bihk,bjhk,hij,bjhv->bihv", q, key, weights, value) * 0.5
    got, state = naive_lightning_attn(q, key, value, decay, scale=0.5)
    torch.testing.assert_close(got, want)
    assert state.shape == (b, h, k, v) and got.dtype == torch.float64


def test_a_sequence_can_be_cut_and_continued():
    q, k, v = torch.randn(3, 1, 10, 2, 4).double().unbind(0)
    whole, final = naive_lightning_attn(q, k, v, log_decay(2), scale=1.0)
    first, state = naive_lightning_attn(q[:, :6], k[:, :6], v[:, :6], log_decay(2), scale=1.0)
    second, state = naive_lightning_attn(
        q[:, 6:], k[:, 6:], v[:, 6:], log_decay(2), scale=1.0, initial_state=state
    )
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(state, final)


def test_packed_documents_equal_separate_sequences():
    q, k, v = torch.randn(3, 1, 10, 2, 4).double().unbind(0)
    state = torch.randn(1, 2, 4, 4).double()
    ids = torch.tensor([[3, 3, 3, 7, 8, 8, 8, 8, 8, 8]], dtype=torch.int32)
    got, final = naive_lightning_attn(
        q, k, v, log_decay(2), scale=1.0, initial_state=state, document_ids=ids
    )
    for part, start in ((slice(0, 3), state), (slice(3, 4), None), (slice(4, 10), None)):
        want, last = naive_lightning_attn(
            q[:, part], k[:, part], v[:, part], log_decay(2), scale=1.0, initial_state=start
        )
        torch.testing.assert_close(got[:, part], want)
    torch.testing.assert_close(final, last)
