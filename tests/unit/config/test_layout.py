import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hypenet.config.layout import (
    PROCESSES,
    Layout,
    divisors_near,
    even_layout,
    multiples_near,
    phrase,
)
from tests.unit.config.test_checks import MODEL, axes, run


@given(value=st.integers(1, 5000), wanted=st.integers(1, 200))
def test_divisors_divide_and_the_nearest_comes_first(value, wanted):
    found = divisors_near(value, wanted)
    assert found and all(value % size == 0 for size in found) and len(set(found)) == len(found)
    assert abs(found[0] - wanted) == min(abs(size - wanted) for size in found)


@given(unit=st.integers(1, 300), wanted=st.integers(1, 10000))
def test_multiples_are_multiples(unit, wanted):
    low, high = multiples_near(unit, wanted)
    assert low > 0 and low % unit == 0 and high == low + unit


@given(layers=st.integers(1, 100), stages=st.integers(1, 100))
def test_even_layouts_place_every_layer_and_differ_by_one(layers, stages):
    split = even_layout(layers, stages)
    assert len(split) == stages and sum(split) == layers and max(split) - min(split) <= 1


def test_replicas():
    assert Layout(MODEL, run(axes(tp=2, pp=2)), 12).dp_size == 3
    assert Layout(MODEL, run(axes(tp=2, pp=2)), 6).dp_size is None
    assert (
        Layout(None, run(axes(tp=2, cp=2))).processes,
        Layout(None, run(axes(tp=2, cp=2))).dp_size,
    ) == (4, 1)
    assert Layout(MODEL, run()).tensor_unit == 8


def test_changes_apply_to_a_copy():
    layout = Layout(MODEL, run(axes(tp=2, pp=2, sequence_parallel=True, pipeline_layout=[1, 3])), 4)
    changed = layout.changed(
        {**layout.with_tensor(1), **layout.with_pipeline(4), PROCESSES: 8, "align.seq_length": 12}
    )
    assert (changed.parallel.tensor_model_parallel_size, changed.parallel.sequence_parallel) == (
        1,
        False,
    )
    assert (changed.parallel.pipeline_model_parallel_size, changed.parallel.pipeline_layout) == (
        4,
        None,
    )
    assert (changed.world_size, changed.run.align.seq_length, changed.run.distill.seq_length) == (
        8,
        12,
        64,
    )
    assert layout.parallel.tensor_model_parallel_size == 2 and layout.run.align.seq_length == 64


def test_the_number_of_processes_follows_unless_it_is_fixed():
    change = {"parallel.tensor_model_parallel_size": 4}
    assert Layout(MODEL, run(), 6).on_fitting_processes(change) == {**change, PROCESSES: 4}
    assert Layout(MODEL, run()).on_fitting_processes(change) == change


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ([{"align.seq_length": 60}, {"align.seq_length": 66}], "use align.seq_length=60 or 66"),
        ([{PROCESSES: 2}, {PROCESSES: 4}], "start 2 or 4 processes"),
        ([{"a.b": (2, 2)}, {"a.b": None}], "use a.b=[2, 2] or null"),
        ([{"a.b": 1}, {"a.c": False, "a.d": 2}], "use a.b=1, or a.c=false with a.d=2"),
        ([{"a.b": 1, PROCESSES: 4}, {PROCESSES: 2}], "use a.b=1 on 4 processes, or 2 processes"),
    ],
)
def test_advice_can_be_copied(changes, says):
    assert phrase(changes) == says
