import pytest
import torch

from megatron_hypenet.data.probes import Probes
from megatron_hypenet.data.questions import Question
from megatron_hypenet.errors import DataError
from megatron_hypenet.eval import suite


def encode(text):
    return [ord(letter) for letter in text]


def model(losses=None, answer=None):
    return suite.Model(lambda ids: (losses(ids), None), answer, encode)


def test_losses_by_length_and_position():
    """The loss of a token is its place in the sequence."""
    asked = []

    def losses(ids):
        asked.append(ids)
        return torch.arange(ids.shape[1] - 1, dtype=torch.float32)[None]

    tokens = torch.arange(701)
    rows = suite.loss_rows(model(losses), tokens, 200, 8)
    assert [part[0, 0].item() for part in asked] == [0, 200, 400] and asked[0].shape == (1, 201)
    assert rows[0] == {"task": "loss", "length": 200, "score": 99.5, "count": 3}
    assert [(row["position"], row["score"]) for row in rows[1:]] == [
        ("0-63", 31.5),
        ("64-127", 95.5),
        ("128-199", 163.5),
    ]
    with pytest.raises(DataError, match="701 tokens and a sequence of 701 needs 702"):
        suite.loss_rows(model(losses), tokens, 701, 1)


def test_a_model_that_copies_finds_all_and_a_mute_one_nothing():
    probes = Probes(encode, seed=0)
    copies = model(answer=lambda ids, most: "".join(map(chr, ids)))
    mute = model(answer=lambda ids, most: "")
    row = suite.probe_row(copies, probes, "needle_multivalue", 900, 0.5, 3)
    assert row == {
        "task": "needle_multivalue",
        "length": 900,
        "depth": 0.5,
        "score": 100.0,
        "count": 3,
    }
    assert suite.probe_row(mute, probes, "needle", 900, 0.5, 2)["score"] == 0


def test_choices_by_likelihood_and_by_generation_and_exact_answers():
    """Likely are texts with many z; said is always B."""
    questions = [
        Question("one", ("zz", "ab"), "zz"),
        Question("two", ("ab", "zz"), "zz"),
        Question("three", ("ab", "zz"), "ab"),
        Question("four", (), "B!"),
        Question("five", (), "C"),
    ]

    def losses(ids):
        return (ids[:, 1:] != ord("z")).float()

    known = model(losses, lambda ids, most: " B!\nand more")
    rows = suite.question_rows(known, questions, "mine")
    assert [(row["way"], round(row["score"]), row["count"]) for row in rows] == [
        ("log-likelihood", 67, 3),
        ("generation", 33, 3),
        ("exact match", 50, 2),
    ]


def test_models_stand_side_by_side():
    rows = [
        {"model": name, "measure": "x", "task": "needle", "length": 8, "depth": 0.5, "score": value}
        for name, value in (("a", 1.0), ("b", 2.0))
    ]
    assert suite.merged(rows) == [{"task": "needle", "length": 8, "depth": 0.5, "a": 1.0, "b": 2.0}]
