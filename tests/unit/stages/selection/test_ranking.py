"""Ranking is a pure function: deterministic ties, and exactly the wanted number of layers."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hypenet.errors import ConfigError, DataError
from megatron_hypenet.stages.selection.method import RankSettings
from megatron_hypenet.stages.selection.ranking import load_selection, rank
from tests.halo_scores import SCORES, halo_scores


def ranked(scores, num_attention):
    return rank(scores, RankSettings(num_attention=num_attention), "lightning_attn")


def test_rank_keeps_the_most_important_layers_and_breaks_ties_downwards():
    scores = halo_scores((80.0, 60.0, 70.0, 60.0), (50.0, 48.0, 50.0, 48.0))
    selection = ranked(scores, 2)
    assert selection.attention_layers == (1, 2)
    assert selection.to_json() == {
        "mixer_types": ["lightning_attn", "attn", "attn", "lightning_attn"],
        "attention_layers": [1, 2],
    }


@given(SCORES, st.data())
def test_every_selection_keeps_exactly_the_top_layers(scores, data):
    num_attention = data.draw(st.integers(1, scores.num_layers))
    selection = ranked(scores, num_attention)
    kept = set(selection.attention_layers)
    assert len(kept) == num_attention == selection.mixer_types.count("attn")
    assert len(selection.mixer_types) == scores.num_layers
    assert all(0.0 <= value <= 50.0 for value in selection.importance)
    for inside in kept:
        for outside in set(range(scores.num_layers)) - kept:
            assert (-selection.importance[inside], inside) < (
                -selection.importance[outside],
                outside,
            )


@given(SCORES)
def test_more_attention_only_adds_layers(scores):
    chosen = [set(ranked(scores, n).attention_layers) for n in range(1, scores.num_layers + 1)]
    assert all(smaller < larger for smaller, larger in zip(chosen, chosen[1:], strict=False))


@pytest.mark.parametrize("num_attention", [-1, 0, 5])
def test_a_number_outside_the_depth_is_refused(num_attention):
    with pytest.raises(ConfigError, match=f"num_attention={num_attention} .* 4 scored layers"):
        ranked(halo_scores((1.0,) * 4, (1.0,) * 4), num_attention)


def test_scores_of_one_number_are_not_ranked_for_another():
    """Gates were learned for a number of layers; which ones would be kept of another number is not
    known."""
    scores = replace(halo_scores((1.0, 2.0, 3.0), (1.0,) * 3), num_attention=2)
    assert len(ranked(scores, 2).attention_layers) == 2
    with pytest.raises(ConfigError, match="2 attention layers, and num_attention=1 .* use 2"):
        ranked(scores, 1)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"mixer_types": 3, "attention_layers": [0]}',
        '{"mixer_types": ["attn"], "attention_layers": ["0"]}',
        "{",
    ],
)
def test_a_selection_file_of_another_form_is_refused(tmp_path, text):
    (tmp_path / "mixers.json").write_text(text)
    with pytest.raises(DataError, match="mixers.json: .*hypenet select rank"):
        load_selection(tmp_path / "mixers.json", num_layers=1)


def test_a_selection_file_must_agree_with_the_model(tmp_path):
    path = tmp_path / "mixers.json"
    path.write_text(json.dumps(ranked(halo_scores((1.0, 2.0), (1.0, 1.0)), 1).to_json()))
    assert load_selection(path, num_layers=2).attention_layers == (0,)
    with pytest.raises(DataError, match="2 mixer_types, but the teacher has 3"):
        load_selection(path, num_layers=3)
    path.write_text('{"mixer_types": ["attn", "lightning_attn"], "attention_layers": [1]}')
    with pytest.raises(DataError, match="disagree"):
        load_selection(path, num_layers=2)
    path.write_text('{"mixer_types": ["attn", "mamba3"], "attention_layers": [0]}')
    with pytest.raises(DataError, match=r"unknown mixers \['mamba3'\]; known mixers: attn, "):
        load_selection(path, num_layers=2)
