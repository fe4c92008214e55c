"""HALO's method: the paper's formula, and scores of evaluations."""

import json

import pytest

from megatron_hypenet.errors import DataError
from megatron_hypenet.stages.selection.halo import HaloMethod, scores_of_evaluations
from megatron_hypenet.stages.selection.method import RankSettings
from tests.halo_scores import halo_scores


def test_importance_is_the_papers_formula_with_its_cap():
    scores = halo_scores((80.0, 60.0, 70.0, 80.0), (50.0, 48.0, 50.0, 40.0))
    got = HaloMethod().importance(scores, RankSettings(num_attention=1))
    # layer 2 loses recall and no commonsense: 10 / 1e-10, capped; the best recall layers cost
    # nothing
    assert got == pytest.approx((0.0, 10.0, 50.0, 0.0))
    capped = RankSettings(num_attention=1, importance_cap=5.0)
    assert HaloMethod().importance(scores, capped) == pytest.approx((0.0, 5.0, 5.0, 0.0))


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
    assert found == halo_scores((20.0, 20.5), (40.0, 41.0))
    with pytest.raises(DataError, match="task hellaswag has several metrics: choose hellaswag:acc"):
        scores_of_evaluations(tmp_path, ["fda"], ["hellaswag"])
    with pytest.raises(DataError, match="no row of task needle; it has fda, hellaswag, swde"):
        scores_of_evaluations(tmp_path, ["needle"], ["fda"])
    evaluation(tmp_path, 3)
    with pytest.raises(DataError, match="no evaluation of layer 2, 2/eval.json"):
        scores_of_evaluations(tmp_path, ["fda"], ["fda"])
