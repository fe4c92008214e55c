"""Layers per pipeline stage: the best there is, by comparison with all there are."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.errors import LayoutError
from megatron_hypenet.model.pipeline_layout import (
    balanced_layout,
    layer_costs,
    layers_of_stage,
    pipeline_layout,
)
from tests.tiny import tiny_model_config


def load(layout, costs, head):
    loads = [sum(costs[i] for i in layers_of_stage(layout, stage)) for stage in range(len(layout))]
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


def test_every_layer_lies_on_one_stage():
    assert [list(layers_of_stage((2, 1, 3), stage)) for stage in range(3)] == [
        [0, 1],
        [2],
        [3, 4, 5],
    ]
