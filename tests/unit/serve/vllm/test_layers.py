import pytest

TWO_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)  # two processes that import the engine
@pytest.mark.parametrize(
    ("mixer", "changes"),
    [
        # one norm over the heads of both ranks, decays by head, and one key/value head on both
        ("lightning-attn", {"num_key_value_heads": 1}),
        ("kda", {"kda_use_conv": True, "kda_conv_size": 4}),
    ],
)
def test_two_tensor_parallel_ranks_give_the_tokens_of_one(same_tokens, mixer, changes):
    same_tokens(mixer, TWO_RANKS, **changes)
