"""Scores files: what can be ranked is read, and everything else is refused with its reasons."""

import json

import pytest
from hypothesis import given

from megatron_hypenet.errors import DataError
from megatron_hypenet.stages.selection.method import LayerScores
from megatron_hypenet.stages.selection.scores import load_scores, parse_scores
from tests.halo_scores import SCORES


def payload(scores):
    """Return a decoded scores file."""
    names, columns = list(scores.values), list(scores.values.values())
    rows = zip(*columns, strict=True)
    layers = {str(i): dict(zip(names, row, strict=True)) for i, row in enumerate(rows)}
    return {"method": scores.method, "layers": layers}


@given(SCORES)
def test_scores_survive_the_file_format(scores):
    content = json.loads(json.dumps(payload(scores)))
    assert parse_scores(content) == scores
    del content["method"]  # as other programs and older versions write them
    assert parse_scores(content) == scores


def test_what_a_method_adds_is_read():
    layers = {"0": {"gate": 0.25}, "1": {"gate": 0.75}}
    more = {"num_attention_layers": 1, "tokens": 4096, "seconds": 1.5, "losses": [0.5]}
    assert parse_scores({"method": "gates", "layers": layers, **more}) == LayerScores(
        method="gates",
        num_layers=2,
        values={"gate": (0.25, 0.75)},
        num_attention=1,
        tokens=4096,
        seconds=1.5,
    )
    empty = parse_scores({"method": "uniform", "layers": {"0": {}, "1": {}}})
    assert empty == LayerScores(method="uniform", num_layers=2, values={})


@pytest.mark.parametrize("method", ["kl", "gates"])
def test_an_unfinished_file_is_not_ranked(method):
    with pytest.raises(DataError, match="non-empty object"):
        parse_scores({"method": method, "num_layers": 2, "partial": {"sequences": 3}})


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
        ({"method": "best", "layers": {"0": {}}}, "method is 'best'; methods are halo, kl, gates"),
        ({"method": ["kl"], "layers": {"0": {}}}, "method is"),
        ({"method": "kl", "layers": {"0": {"recall": 1}}}, "kl is missing"),
        ({"method": "uniform", "layers": {"0": {}}, "tokens": -1}, "tokens is -1"),
        ({"method": "uniform", "layers": {"0": {}}, "seconds": "long"}, "seconds is 'long'"),
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


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(DataError, match="hypenet select"):
        load_scores(tmp_path / "none.json")
