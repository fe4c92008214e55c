"""Slow ranks are named after several intervals, among their own kind, and not for noise."""

import pytest

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.parallel import groups
from megatron_hypenet.training import stragglers
from megatron_hypenet.training.stragglers import SlowRank, StepTimes, named


class Said:
    """A clock that was told what it will say."""

    def __init__(self, seconds=0.0):
        self.seconds = seconds

    def take(self):
        return self.seconds


@pytest.fixture
def ranks(monkeypatch):
    """Provide StepTimes of ranks whose hosts, pipeline stages and seconds per step are given."""
    groups.init_parallel(ParallelConfig())

    def make(places):
        monkeypatch.setattr(stragglers, "gather_to_all", lambda own: places)
        return StepTimes(Said())

    def compare(times, *seconds):
        monkeypatch.setattr(groups, "gather_numbers", lambda own: list(seconds))
        return times.compare(1)

    return make, compare


def test_one_process_is_never_slow():
    groups.init_parallel(ParallelConfig())
    times = StepTimes(Said(0.5))
    for _ in range(5):
        points, slow = times.compare(5)
        assert (
            points
            == {
                "speed/rank-time-min-ms": 100.0,
                "speed/rank-time-median-ms": 100.0,
                "speed/rank-time-max-ms": 100.0,
            }
            and slow == []
        )


def test_named_after_three_intervals_in_a_row(ranks):
    make, compare = ranks
    times = make([("n0", 0), ("n0", 0), ("n1", 0), ("n1", 0)])
    slow_one, even = (0.1, 0.1, 0.1, 0.2), (0.1, 0.1, 0.1, 0.12)
    assert [
        compare(times, *seconds)[1] for seconds in (slow_one, slow_one, even, slow_one, slow_one)
    ] == [[]] * 5
    points, slow = compare(times, *slow_one)
    assert slow == [SlowRank(3, "n1", pytest.approx(2.0))] and named(slow) == "rank 3 on n1 2.0x"
    assert points == {
        "speed/rank-time-min-ms": 100.0,
        "speed/rank-time-median-ms": 100.0,
        "speed/rank-time-max-ms": 200.0,
    }
    assert compare(times, *even)[1] == []


def test_pipeline_stages_are_compared_with_themselves_and_noise_counts_nothing(ranks):
    make, compare = ranks
    times = make([("n0", 0), ("n0", 0), ("n1", 1), ("n1", 1)])
    for _ in range(4):
        assert (
            compare(times, 0.1, 0.1, 0.3, 0.3)[1] == []
            and compare(times, 0.001, 0.002, 0.003, 0.003)[1] == []
        )
    for _ in range(3):
        slow = compare(times, 0.1, 0.1, 0.3, 0.6)[1]
    assert [found.rank for found in slow] == [3]


def test_long_lists_are_cut():
    slow = [SlowRank(rank, "n", 2.0) for rank in range(12)]
    assert named(slow).endswith("rank 7 on n 2.0x, and 4 more") and named([]) == ""
