import pytest


@pytest.mark.slow
def test_a_student_without_norms_with_biases_and_scaled_frequencies(same_tokens):
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    changes = {"attn_use_qk_norm": False, "qkv_bias": True, "rope_scaling": llama3}
    cached = same_tokens("lightning-attn", **changes)
    assert cached[-1] >= 128


@pytest.mark.slow
def test_heads_of_a_size_without_kernels_and_a_constant_scale(same_tokens):
    cached = same_tokens("lightning-attn", head_dim=16, attn_logits_scaling=0.7)
    assert cached[-1] >= 128
