import pytest
import torch

from megatron_hypenet.ops.decay import alibi_slopes, log_decay


def test_powers_of_two_are_a_geometric_series():
    torch.testing.assert_close(
        alibi_slopes(8),
        torch.tensor([2.0**-i for i in range(1, 9)], dtype=torch.float64),
        rtol=0,
        atol=0,
    )


def test_other_counts_fill_up_with_every_second_slope_of_the_next_power():
    # 4 heads, then slopes 0 and 2 of 8 heads
    want = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    assert alibi_slopes(6).tolist() == want


@pytest.mark.parametrize("num_heads", range(1, 67))
def test_every_head_count_forgets_and_none_slower_than_two_to_minus_eight(num_heads):
    slopes = alibi_slopes(num_heads)
    assert slopes.shape == (num_heads,) and slopes.dtype == torch.float64
    assert (slopes >= 2.0**-8).all() and (slopes < 1).all()
    assert slopes.unique().numel() == num_heads
    assert torch.equal(log_decay(num_heads), -slopes)


def test_no_heads_is_refused():
    with pytest.raises(ValueError, match="num_heads=0"):
        alibi_slopes(0)
