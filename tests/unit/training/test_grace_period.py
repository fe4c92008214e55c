"""The slowest of what was measured decides how early a run must be told to leave, over all stages
of a run."""

import json

from megatron_hypenet.training import grace_period
from megatron_hypenet.training.grace_period import Timing, read


def test_grace_covers_a_step_an_evaluation_and_a_save(tmp_path):
    measured = Timing("align", background=False)
    for seconds in (1.0, 4.0, 2.0):
        measured.step(seconds)
    measured.evaluation(6.0)
    measured.save(10.0)
    assert measured.figures() == {
        "step_seconds": 4.0,
        "evaluate_seconds": 6.0,
        "save_seconds": 10.0,
        "margin_seconds": 40.0,
        "grace_seconds": 60,
    }
    assert set(measured.figures()) <= set(grace_period.__doc__.replace(",", " ").split())


def test_a_pending_save_is_waited_for_too():
    measured = Timing("align", background=True)
    measured.save(10.0)
    assert measured.figures()["grace_seconds"] == 60


def test_the_file_keeps_all_stages_and_the_longest_counts(tmp_path):
    assert read(tmp_path) == {}
    for stage, seconds in (("align", 20.0), ("distill", 100.0), ("finetune", 1.0)):
        measured = Timing(stage, background=False)
        measured.save(seconds)
        measured.write(tmp_path)
    content = json.loads((tmp_path / "timing.json").read_text())
    assert content == read(tmp_path) and list(content["stages"]) == ["align", "distill", "finetune"]
    assert (content["save_seconds"], content["grace_seconds"]) == (100.0, 180)
    (tmp_path / "timing.json").write_text("[")
    assert read(tmp_path) == {}
