"""Intervals against published values and against the definition."""

import math

import pytest

from megatron_hypenet.eval.intervals import share_interval, standard_error


def test_standard_error_is_the_deviation_over_the_root_of_the_count():
    assert standard_error([1.0, 3.0, 5.0, 7.0]) == pytest.approx(math.sqrt(20 / 3) / 2)
    assert standard_error([2.0]) is None and standard_error([2.0, 2.0]) == 0.0


def test_wilsons_interval():
    # 81 of 263: 0.2553 to 0.3662 (Newcombe 1998, table I, method 3); 0 of 20: 0 to 0.1611
    assert share_interval(100 * 81 / 263, 263) == pytest.approx((25.53, 36.62), abs=0.01)
    assert share_interval(0.0, 20) == pytest.approx((0.0, 16.11), abs=0.01)
    low, high = share_interval(100.0, 20)
    assert (low, high) == pytest.approx((100 - 16.11, 100.0), abs=0.01)


def test_its_ends_solve_the_equation_that_defines_it():
    for end in share_interval(30.0, 50):
        p = end / 100
        assert abs(0.3 - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / 50))


def test_a_share_lies_within_its_interval_whatever_is_rounded():
    for count in (*range(1, 70), 256, 1000):
        for hits in range(count + 1):
            percent = 100 * hits / count
            low, high = share_interval(percent, count)
            assert 0 <= low <= percent <= high <= 100
