import pytest


@pytest.mark.slow
def test_engine_gives_the_exported_tokens(same_tokens):
    cached = same_tokens("lightning-attn")
    assert cached[-1] >= 128  # whole blocks of the long prompt, with their states
