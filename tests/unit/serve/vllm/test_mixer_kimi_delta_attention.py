import pytest


@pytest.mark.slow
def test_engine_gives_the_exported_tokens_with_convolutions(same_tokens):
    cached = same_tokens("kda", kda_use_rope=True, kda_use_conv=True, kda_conv_size=4)
    assert cached[-1] >= 128
