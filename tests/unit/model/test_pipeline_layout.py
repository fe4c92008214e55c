"""Layers per pipeline stage: the best there is, by comparison with all there are."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.errors import LayoutError
from megatron_hypenet.model.pipeline_layout import (
    balanced_layout,
    chunks_of_stage,
    layer_costs,
    layers_of_chunk,
    pipeline_layout,
)
from megatron_hypenet.model.pipeline_schedule import step_length
from tests.tiny import tiny_model_config


def load(layout, costs, head):
    loads = [sum(costs[i] for i in layers_of_chunk(layout, stage)) for stage in range(len(layout))]
    loads[-1] += head
    return max(loads)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 9).map(float), min_size=1, max_size=9),
    st.integers(1, 5),
    st.integers(0, 20).map(float),
)
def test_no_other_layout_is_better(costs, stages, head):
    if stages > len(costs):
        with pytest.raises(LayoutError, match="cannot fill"):
            balanced_layout(costs, stages, head=head)
        return
    found = balanced_layout(costs, stages, head=head)
    assert sum(found) == len(costs) and min(found) >= 1 and len(found) == stages
    cuts = [(0, *inner, len(costs)) for inner in combinations(range(1, len(costs)), stages - 1)]
    every = [tuple(b - a for a, b in zip(cut, cut[1:], strict=False)) for cut in cuts]
    assert load(found, costs, head) == min(load(layout, costs, head) for layout in every)


def test_the_head_takes_layers_off_the_last_stage():
    assert balanced_layout([1.0] * 8, 2) == (4, 4)
    assert balanced_layout([1.0] * 8, 2, head=4.0) == (6, 2)
    assert balanced_layout([1.0] * 7, 4) == (2, 2, 2, 1)


def test_softmax_layers_weigh_more_the_longer_the_sequence():
    model = tiny_model_config(("attn", "lightning_attn"))
    (short_attn, short_rnn) = layer_costs(model, 64)
    (long_attn, long_rnn) = layer_costs(model, 65536)
    assert short_attn < short_rnn == long_rnn < long_attn


def test_a_written_layout_wins_and_has_to_fit():
    model = tiny_model_config(("lightning_attn",) * 4)
    parallel = ParallelConfig(pipeline_model_parallel_size=2, pipeline_layout=(3, 1))
    assert pipeline_layout(model, parallel) == (3, 1)
    with pytest.raises(
        LayoutError, match=r"\[3, 2\] places 5 layers on 2 stages; the model has 4 layers"
    ):
        pipeline_layout(model, parallel.model_copy(update={"pipeline_layout": (3, 2)}))
    assert pipeline_layout(model, ParallelConfig()) == (4,)


def test_chunks_are_balanced_by_the_step_they_make():
    assert balanced_layout([1.0] * 8, 2, chunks_per_stage=2) == (2, 2, 2, 2)
    assert balanced_layout([1.0] * 9, 2, chunks_per_stage=4) == (2, 1, 1, 1, 1, 1, 1, 1)
    with pytest.raises(LayoutError, match="8 layers cannot fill 3 chunks on each of 3 pipeline"):
        balanced_layout([1.0] * 8, 3, chunks_per_stage=3)


def step_of(costs, layout, head):
    loads = [sum(costs[i] for i in layers_of_chunk(layout, chunk)) for chunk in range(len(layout))]
    loads[-1] += head
    return step_length(loads, 2, 8)


@pytest.mark.parametrize(("chunks", "share"), [(2, 0.92), (4, 0.92)])
def test_a_head_of_several_layers_is_shared_out_between_the_stages(chunks, share):
    """As that of HypeNet-2B: 28 layers, two kinds of them, and a head of almost five."""
    costs = [1.4 if layer % 4 == 3 else 1.0 for layer in range(28)]
    found = balanced_layout(costs, 2, chunks_per_stage=chunks, head=5.0)
    assert sum(found) == 28 and min(found) >= 1 and len(found) == 2 * chunks
    assert found[-1] < 28 / len(found)
    best = 8 * (sum(costs) + 5.0) / 2  # without any bubble
    assert best / step_of(costs, found, 5.0) > share
    even = (7,) * 4 if chunks == 2 else (4, 4, 4, 4, 3, 3, 3, 3)
    assert step_of(costs, found, 5.0) < step_of(costs, even, 5.0)


def test_a_written_layout_of_chunks_has_to_fit():
    model = tiny_model_config(("lightning_attn",) * 5)
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        pipeline_layout=(1, 1, 2, 1),
    )
    assert pipeline_layout(model, parallel) == (1, 1, 2, 1)
    with pytest.raises(LayoutError, match=r"on 2 chunks; .*virtual.*=2\. Give 4 numbers"):
        pipeline_layout(model, parallel.model_copy(update={"pipeline_layout": (3, 2)}))


def test_chunks_go_round_the_stages():
    layout = (2, 1, 3, 1)
    assert [list(map(list, chunks_of_stage(layout, stage, 2))) for stage in range(2)] == [
        [[0, 1], [3, 4, 5]],
        [[2], [6]],
    ]


def test_every_layer_lies_on_one_stage():
    assert [list(layers_of_chunk((2, 1, 3), stage)) for stage in range(3)] == [
        [0, 1],
        [2],
        [3, 4, 5],
    ]
