import torch

from megatron_hypenet.ops.l2_norm import l2_norm


def test_length_one_and_small_vectors_shrink():
    x = torch.tensor([[3.0, 4.0], [0.0, 1e-3]], dtype=torch.float64)
    got = l2_norm(x)
    torch.testing.assert_close(
        got[0], torch.tensor([0.6, 0.8], dtype=torch.float64), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(got[1, 1], torch.tensor(2**-0.5, dtype=torch.float64))


def test_bfloat16_is_rounded_once():
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(l2_norm(x), l2_norm(x.float()).bfloat16())
