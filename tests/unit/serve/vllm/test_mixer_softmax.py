import pytest


@pytest.mark.slow
def test_heads_of_a_size_without_kernels_and_a_constant_scale(same_tokens):
    cached = same_tokens("lightning-attn", head_dim=16, attn_logits_scaling=0.7)
    assert cached[-1] >= 128
