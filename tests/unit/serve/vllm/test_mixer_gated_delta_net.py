import pytest


@pytest.mark.slow
def test_engine_gives_the_exported_tokens(same_tokens):
    cached = same_tokens("gdn", gdn_nkv=2, gdn_use_gate=True, gdn_use_rope=True)
    assert cached[-1] >= 128
