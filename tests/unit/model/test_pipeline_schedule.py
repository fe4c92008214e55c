"""The followed schedules are Megatron's, and take the time that is known of them."""

import pytest
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from megatron_hypenet.model.pipeline_schedule import passes_of_stage, step_length


@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), [(2, 2, 8), (2, 4, 2), (4, 2, 8)])
def test_passes_are_those_of_megatron(stages, chunks, micro_batches):
    """The order of its table, and its number of passes before the first one back (2 for each stage
    behind, a round for each chunk but one)."""
    table = get_schedule_table(micro_batches, chunks, stages)
    for stage in range(stages):
        found = passes_of_stage(stage, stages, chunks, micro_batches)
        ahead = 2 * (stages - stage - 1) + (chunks - 1) * stages
        assert [place[1:] for place in found if place[0]] == table
        assert [place[1:] for place in found if not place[0]] == [
            (micro_batch, chunks - 1 - chunk) for micro_batch, chunk in table
        ]
        first_back = [place[0] for place in found].index(False)
        assert first_back == min(ahead + 1, len(table))


def test_plain_1f1b_begins_one_for_each_stage_behind():
    assert [forward for forward, *_ in passes_of_stage(0, 3, 1, 4)] == [
        True, True, True, False, True, False, False, False,
    ]  # fmt: skip
    assert passes_of_stage(2, 3, 1, 2) == [(True, 0, 0), (False, 0, 0), (True, 1, 0), (False, 1, 0)]


@pytest.mark.parametrize(
    ("stages", "chunks", "micro_batches"), [(1, 1, 3), (2, 1, 8), (2, 2, 8), (2, 4, 8), (4, 2, 16)]
)
def test_equal_chunks_wait_for_the_bubble_alone(stages, chunks, micro_batches):
    """(p - 1) / v of a micro-batch's time (Narayanan et al. 2021, arXiv 2104.04473, section
    2.2)."""
    length = step_length([1 / chunks] * (stages * chunks), stages, micro_batches)
    assert length == pytest.approx(micro_batches + (stages - 1) / chunks)


def test_the_slowest_stage_sets_the_pace():
    assert step_length([1.0, 3.0], 2, 50) == pytest.approx(50 * 3.0, rel=0.01)
    assert step_length([1.0, 3.0, 3.0, 1.0], 2, 50) < 50 * 4.1, "both stages have as much"
