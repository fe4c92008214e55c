import pytest


@pytest.mark.slow
def test_the_rule_without_convolutions_norms_and_rope(same_tokens):
    cached = same_tokens("kda", kda_use_qk_norm=False)
    assert cached[-1] >= 128
