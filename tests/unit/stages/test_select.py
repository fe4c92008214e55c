"""Ranking is a pure function: the paper's formula, deterministic ties, and no unranked garbage."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hypenet.errors import ConfigError, DataError
from megatron_hypenet.stages.select import (
    LayerScores,
    importance,
    load_scores,
    load_selection,
    parse_scores,
    rank,
    scores_of_evaluations,
)

METRIC = st.floats(min_value=0, max_value=100, allow_nan=False)
SCORES = st.lists(st.tuples(METRIC, METRIC), min_size=1, max_size=40).map(
    lambda rows: LayerScores(
        recall=tuple(r for r, _ in rows), commonsense=tuple(c for _, c in rows)
    )
)


def payload(recall, commonsense):
    """Return a decoded scores file."""
    return {
        "layers": {
            str(i): {"recall": r, "commonsense": c}
            for i, (r, c) in enumerate(zip(recall, commonsense, strict=True))
        }
    }


def test_importance_is_the_papers_formula_with_its_cap():
    got = importance(
        LayerScores(recall=(80.0, 60.0, 70.0, 80.0), commonsense=(50.0, 48.0, 50.0, 40.0))
    )
    # layer 2 loses recall and no commonsense: 10 / 1e-10, capped; the best recall layers cost
    # nothing
    assert got == pytest.approx((0.0, 10.0, 50.0, 0.0))


def test_rank_keeps_the_most_important_layers_and_breaks_ties_downwards():
    scores = LayerScores(recall=(80.0, 60.0, 70.0, 60.0), commonsense=(50.0, 48.0, 50.0, 48.0))
    selection = rank(scores, 2, "lightning_attn")
    assert selection.attention_layers == (1, 2)
    assert selection.to_json() == {
        "mixer_types": ["lightning_attn", "attn", "attn", "lightning_attn"],
        "attention_layers": [1, 2],
    }


@given(SCORES, st.data())
def test_every_selection_keeps_exactly_the_top_layers(scores, data):
    num_attention = data.draw(st.integers(1, scores.num_layers))
    selection = rank(scores, num_attention, "lightning_attn")
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
    chosen = [
        set(rank(scores, n, "lightning_attn").attention_layers)
        for n in range(1, scores.num_layers + 1)
    ]
    assert all(smaller < larger for smaller, larger in zip(chosen, chosen[1:], strict=False))


@given(SCORES)
def test_scores_survive_the_file_format(scores):
    assert (
        parse_scores(json.loads(json.dumps(payload(scores.recall, scores.commonsense)))) == scores
    )


@pytest.mark.parametrize("num_attention", [-1, 0, 5])
def test_a_number_outside_the_depth_is_refused(num_attention):
    with pytest.raises(ConfigError, match=f"num_attention={num_attention} .* 4 scored layers"):
        rank(
            LayerScores(recall=(1.0,) * 4, commonsense=(1.0,) * 4), num_attention, "lightning_attn"
        )


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({}, "non-empty object"),
        ([], "non-empty object"),
        ({"layers": {}}, "non-empty object"),
        (
            {
                "layers": {
                    "0": {"recall": 1, "commonsense": 1},
                    "2": {"recall": 1, "commonsense": 1},
                }
            },
            "missing layers 1",
        ),
        (
            {"num_layers": 3, "layers": {"0": {"recall": 1, "commonsense": 1}}},
            "missing layers 1, 2",
        ),
        (
            {
                "num_layers": 1,
                "layers": {
                    "0": {"recall": 1, "commonsense": 1},
                    "1": {"recall": 1, "commonsense": 1},
                },
            },
            "beyond num_layers=1",
        ),
        ({"layers": {"0": {"recall": float("nan"), "commonsense": 1}}}, "recall is nan"),
        ({"layers": {"0": {"recall": 1, "commonsense": float("inf")}}}, "commonsense is inf"),
        ({"layers": {"0": {"recall": 1}}}, "commonsense is missing"),
        ({"layers": {"0": {"recall": "high", "commonsense": True}}}, "recall is 'high'"),
        ({"layers": {"0": 3}}, "expected an object"),
        ({"layers": {"00": {"recall": 1, "commonsense": 1}}}, "not a plain layer index"),
    ],
)
def test_scores_that_cannot_be_ranked_are_refused(broken, message):
    with pytest.raises(DataError, match=message):
        parse_scores(broken)


def test_all_problems_are_named_at_once():
    broken = {"layers": {"0": {"recall": float("nan")}, "3": {"recall": 1, "commonsense": 1}}}
    with pytest.raises(DataError) as caught:
        parse_scores(broken)
    assert all(
        part in str(caught.value)
        for part in ("missing layers 1, 2", "recall is nan", "commonsense is missing")
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"layers": {"0": {"recall": 1, "commonsense": 1}, "0": {"recall": 2, "commonsense": '
            "1}}}",
            "the key '0' is written twice",
        ),
        ('{"layers": ', "not valid JSON"),
        ('{"layers": {"0": {"recall": NaN, "commonsense": 1}}}', "NaN is no number"),
    ],
)
def test_a_broken_file_is_refused_with_its_path(tmp_path, text, message):
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        load_scores(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "broken",
    [
        {"num_layers": 10**9, "layers": {"0": {"recall": 1, "commonsense": 1}}},
        {"layers": {"999999999": {"recall": 1, "commonsense": 1}}},
        {"layers": {"9" * 5000: {"recall": 1, "commonsense": 1}}},
        {"layers": {"0": {"recall": 10**90, "commonsense": [1]}}},
    ],
)
def test_huge_numbers_are_refused_at_once(tmp_path, broken):
    (tmp_path / "scores.json").write_text(json.dumps(broken))
    with pytest.raises(DataError) as caught:
        load_scores(tmp_path / "scores.json")
    assert len(str(caught.value)) < 1000


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


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(DataError, match="hypenet select"):
        load_scores(tmp_path / "none.json")


def test_a_selection_file_must_agree_with_the_model(tmp_path):
    path = tmp_path / "mixers.json"
    path.write_text(
        json.dumps(
            rank(
                LayerScores(recall=(1.0, 2.0), commonsense=(1.0, 1.0)), 1, "lightning_attn"
            ).to_json()
        )
    )
    assert load_selection(path, num_layers=2).attention_layers == (0,)
    with pytest.raises(DataError, match="2 mixer_types, but the teacher has 3"):
        load_selection(path, num_layers=3)
    path.write_text('{"mixer_types": ["attn", "lightning_attn"], "attention_layers": [1]}')
    with pytest.raises(DataError, match="disagree"):
        load_selection(path, num_layers=2)
    path.write_text('{"mixer_types": ["attn", "mamba3"], "attention_layers": [0]}')
    with pytest.raises(DataError, match=r"unknown mixers \['mamba3'\]; known mixers: attn, "):
        load_selection(path, num_layers=2)


def evaluation(folder, layer, **scores):
    """Write the evaluation of a model with one layer replaced, beside its teacher's."""
    rows = [
        {"model": model, "measure": "m", "task": task, "way": way, "score": score, "count": 1}
        for task, ways in scores.items()
        for way, score in ways.items()
        for model, score in (("teacher", 99.0), ("student", score))
    ]
    (folder / str(layer)).mkdir()
    content = {"plan": {"models": {"teacher": "t", "student": "s"}}, "rows": rows}
    (folder / str(layer) / "eval.json").write_text(json.dumps(content))


def test_scores_of_evaluations_are_means_of_the_named_tasks(tmp_path):
    for layer in range(2):
        evaluation(
            tmp_path,
            layer,
            fda={"contains": 10.0 + layer},
            swde={"contains": 30.0},
            hellaswag={"acc": 1.0, "acc_norm": 40.0 + layer},
        )
    found = scores_of_evaluations(tmp_path, ["fda", "swde"], ["hellaswag:acc_norm"])
    assert found == LayerScores(recall=(20.0, 20.5), commonsense=(40.0, 41.0))
    with pytest.raises(DataError, match="task hellaswag has several metrics: choose hellaswag:acc"):
        scores_of_evaluations(tmp_path, ["fda"], ["hellaswag"])
    with pytest.raises(DataError, match="no row of task needle; it has fda, hellaswag, swde"):
        scores_of_evaluations(tmp_path, ["needle"], ["fda"])
    evaluation(tmp_path, 3)
    with pytest.raises(DataError, match="no evaluation of layer 2, 2/eval.json"):
        scores_of_evaluations(tmp_path, ["fda"], ["fda"])
