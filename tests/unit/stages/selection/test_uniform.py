"""Evenly spaced layers."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_hypenet.stages.selection.method import RankSettings, selection_method
from megatron_hypenet.stages.selection.ranking import rank
from megatron_hypenet.stages.selection.scores import parse_scores
from megatron_hypenet.stages.selection.uniform import evenly_spaced


@given(st.integers(1, 64), st.data())
def test_layers_are_at_even_distances_from_each_other_and_both_ends(num_layers, data):
    count = data.draw(st.integers(1, num_layers))
    kept = sorted(evenly_spaced(count, num_layers))
    assert len(kept) == count and kept[0] >= 0 and kept[-1] < num_layers
    gaps = {later - earlier for earlier, later in zip(kept, kept[1:], strict=False)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert abs(kept[0] - (num_layers - 1 - kept[-1])) <= 1


def test_a_quarter_of_28_layers():
    assert sorted(evenly_spaced(7, 28)) == [2, 6, 10, 14, 18, 22, 26]


def test_ranking_takes_them_for_any_number():
    scores = parse_scores({"method": "uniform", "layers": {str(n): {} for n in range(8)}})
    found = rank(scores, RankSettings(num_attention=2), "lightning_attn")
    assert found.attention_layers == (2, 6)
    assert rank(scores, RankSettings(num_attention=8), "m").attention_layers == tuple(range(8))


def test_nothing_is_loaded_or_read(selection_work):
    work = selection_work(num_attention=1)  # without models: to load one would fail
    content = selection_method("uniform").measure(work)
    assert content == {"layers": {"0": {}, "1": {}, "2": {}}, "tokens": 0}
