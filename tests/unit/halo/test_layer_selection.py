"""The cost of layer selection, and attempts that go on; test_actions.py has whole selections."""

import json

import pytest

from megatron_hypenet.halo import layer_selection
from megatron_hypenet.halo.run_folder import RunFolder
from megatron_hypenet.parallel import groups
from megatron_hypenet.stages.selection.method import LayerScores
from megatron_hypenet.stages.selection.uniform import UniformMethod
from tests.unit.halo.test_run_folder import config


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Provide a run folder whose teacher has eight layers."""
    folder = RunFolder(tmp_path / "run")
    folder.scores_file.parent.mkdir(parents=True)

    class Shape:
        num_layers = 8

    monkeypatch.setattr(layer_selection, "read_model_config", lambda place: Shape)
    monkeypatch.setattr(layer_selection.datasets, "measure", lambda run, folder: Measured)
    groups.init_parallel(config(folder.root).parallel)
    return folder


class Measured:
    selection_scores = None


def test_time_adds_up_over_attempts(folder):
    run = config(folder.root, select={"method": "uniform"})
    folder.scores_file.write_text(json.dumps({"method": "uniform", "seconds": 100.0}))
    layer_selection.measure(run, folder, folder.root, progress=lambda done, total: None)
    scores, selection = layer_selection.chosen(run, folder)
    assert 100.0 <= scores.seconds < 160.0
    assert selection.attention_layers == (2, 6)


def test_an_attempt_gets_what_an_earlier_one_saved(folder, monkeypatch):
    seen = []

    def interrupted(self, work):
        seen.append((dict(work.known), work.num_attention, work.num_layers))
        work.save({"partial": len(seen)})
        raise KeyboardInterrupt

    monkeypatch.setattr(UniformMethod, "measure", interrupted)
    run = config(folder.root, select={"method": "uniform", "num_attention_layers": 3})
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            layer_selection.measure(run, folder, folder.root, progress=lambda done, total: None)
    assert seen[0] == ({}, 3, 8)
    known = seen[1][0]
    assert known.pop("seconds") >= 0
    assert known == {"method": "uniform", "num_layers": 8, "partial": 1}


def test_the_cost_is_one_line():
    scores = LayerScores(method="kl", num_layers=1, values={}, tokens=258_048, seconds=72.0)
    line = layer_selection.cost_line(scores)
    assert line == "layer selection: method kl, 258.0k tokens read, time 1m12s"
    unknown = LayerScores(method="halo", num_layers=1, values={})
    assert "unknown tokens read, time unknown" in layer_selection.cost_line(unknown)
