"""The exported code on all ways beside the training model, and the comparison itself."""

import math

import pytest
import torch

from megatron_hypenet.export import hf_model, parity, verify
from megatron_hypenet.export.from_hf import import_hf


@pytest.fixture(scope="module")
def logits():
    return torch.randn(2, 9, 11, generator=torch.Generator().manual_seed(0))


def said(logits, way, row, first, tokens, cached=0):
    """Answer as an engine with these logits says of `tokens`."""
    scores = torch.log_softmax(logits[row].double(), -1)
    found = [float(scores[first - 1 + at, token]) for at, token in enumerate(tokens)]
    return parity.Answer(way, row, first, list(tokens), found, cached)


def test_ways_are_put_together_and_the_worst_place_is_named(logits):
    good = said(logits, "chunks", 0, 1, [3, 4, 5])
    other = said(logits, "chunks", 1, 6, [1, 2], cached=4)
    wrong = parity.Answer("chunks", 1, 6, [1, 2], [other.logprobs[0], other.logprobs[1] - 0.5], 4)
    (way,) = parity.compare("x", [good, other], logits, 1e-9)
    assert way.ok and (way.tokens, way.cached, way.engine) == (5, 4, "x")
    found = parity.compare("x", [good, wrong, said(logits, "batch", 0, 2, [7])], logits, 0.4)
    assert [(way.way, way.ok) for way in found] == [("chunks", False), ("batch", True)]
    assert found[0].worst == "row 1, token 7" and math.isclose(found[0].max_diff, 0.5)


def test_nan_is_beyond_every_bound(logits):
    given = parity.Answer("one prompt", 0, 1, [3, 4], [0.0, math.nan])
    (way,) = parity.compare("x", [given], logits, 1e9)
    assert not way.ok and way.worst == "row 0, token 2"


@pytest.mark.parametrize("student", [False, True])
def test_the_exported_code_agrees_on_every_way(hf_model_folder, student):
    hf, ckpt = hf_model_folder(student)
    config = hf_model.read_config(hf)
    rows = verify.random_rows(config.vocab_size, 24, 3)
    served = parity.ExportedCode(hf_model.load_model(hf, config, "float32", "cpu"), 6)
    report = verify.verify(hf, ckpt, rows=rows, served=[served])
    assert report.ok and report.bound == parity.BOUND["float32"]
    assert [(way.way, way.tokens, way.cached) for way in report.ways] == [
        ("one prompt", 46, 0),
        ("batch", 41, 0),
        ("chunks", 46, 0),
        ("token by token", 12, 0),
        ("copied cache", 12, 36),
    ]
    assert max(way.max_diff for way in report.ways) < 1e-4


@pytest.fixture
def hf_model_folder(hf_model, tmp_path):
    """Provide (Hugging Face folder, checkpoint of the same model)."""

    def build(student):
        folder = hf_model(student=student).write(tmp_path / "hf")
        import_hf(folder, tmp_path / "ckpt")
        return folder, tmp_path / "ckpt"

    return build


def test_a_cache_that_forgets_is_found(hf_model_folder, monkeypatch):
    hf, ckpt = hf_model_folder(True)
    config = hf_model.read_config(hf)
    model = hf_model.load_model(hf, config, "float32", "cpu")
    served = parity.ExportedCode(model, 6)
    answers = served.answers

    def forgets(rows):
        # the tokens one by one as if nothing stood before them
        alone = served._pieces(rows[0, 18:], [])
        kept = [one for one in answers(rows) if one.way != "token by token"]
        return [*kept, parity._answer("token by token", 0, rows[0, 18:], alone)]

    monkeypatch.setattr(served, "answers", forgets)
    rows = verify.random_rows(config.vocab_size, 24, 3)
    report = verify.verify(hf, ckpt, rows=rows, served=[served])
    assert not report.ok and not report.ways[-1].ok and all(way.ok for way in report.ways[:-1])
    (line,) = report.problems()
    assert line.startswith("exported code, token by token: a log-probability differs by ")
