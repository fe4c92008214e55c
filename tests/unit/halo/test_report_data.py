"""What a report reads from run folders, complete ones and older ones."""

import json

import pytest

from megatron_hypenet.errors import DataError
from megatron_hypenet.halo.report_data import Value, run_data, thinned
from megatron_hypenet.halo.run_folder import RunFolder
from tests.unit.halo.test_report import ROWS
from tests.unit.halo.test_run_folder import config

LOSSES = {
    "1": {"loss": 3.25, "standard_error": 0.1, "sequences": 4},
    "2": {"loss": 3.0, "standard_error": None, "sequences": 1},
}
NEW_ROWS = [{**row, "recall_questions": 20, "loss_by_length": LOSSES} for row in ROWS]


def content(rows):
    return {
        "rows": rows,
        "seq_length": 16,
        "train_seq_length": 32,
        "attention_layers": [1],
        "mixer_types": ["lightning_attn", "attn"],
        "attn_logits_scaling": "hype 500",
        "seconds": 75.0,
        "step_seconds": {"align": 60.0, "distill": 15.0},
        "selection": {"method": "halo", "tokens": 4096, "seconds": 75.0},
        "software": {"versions": {"torch": "2.6"}, "git_commit": "abc"},
    }


def write_run(root, rows=NEW_ROWS, *, old=False, **changes):
    """Write the folder of a finished run as far as a report reads it; `old` leaves out what older
    versions did not write."""
    folder = RunFolder(root)
    run = config(root, **changes)
    folder.prepare(run)
    for place in (folder.report_file, folder.scores_file):
        place.parent.mkdir(parents=True)
    folder.report_file.write_text(json.dumps(content(rows)))
    if old:
        return folder, run
    folder.record("data", "f", seconds=1.0, software={}, train_tokens=5000, heldout_tokens=600)
    scores = {"recall": 50.0, "commonsense": 40.0}
    layers = {"0": scores, "1": {"recall": 20.0, "commonsense": 39.0}}
    folder.scores_file.write_text(json.dumps({"baseline": scores, "layers": layers}))
    for stage in ("align", "distill", "finetune"):
        folder.stage(stage).mkdir()
        folder.record(stage, "f", seconds=9.0, software={})
        losses = [
            {"step": step, "loss": 1 / step, "grad_norm": 1.0, "lr": 0.1} for step in range(1, 5)
        ]
        losses[2]["loss"] = None  # a skipped step
        points = [
            {"step": 2, "values": {"speed/tokens-per-second": 10.0, "speed/memory-gib": 1.5}},
            {"step": 4, "values": {"speed/tokens-per-second": 30.0, "speed/mfu": None}},
            {
                "step": 4,
                "values": {
                    **{"eval/kl": 0.2, "eval/align-mse": 0.3, "eval/lm-loss": 2.5},
                    **{"eval/teacher-lm-loss": 2.4, "eval/recall": 75.0},
                    "eval/teacher-recall": 100.0,
                },
            },
        ]
        for name, lines in (("losses.jsonl", losses), ("metrics.jsonl", points)):
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder.stage(stage) / name).write_text(text)
    return folder, run


def test_results_have_intervals_by_length_in_tokens(tmp_path):
    found = run_data(*write_run(tmp_path / "run"), "run")
    row = found.rows[-1]
    assert (row.model, list(row.recall), list(row.loss)) == ("student", [16, 32], [16, 32])
    assert row.recall[16].value == 97.0 and row.recall[16].low < 97.0 < row.recall[16].high
    assert row.loss[16] == Value(
        3.25, pytest.approx(3.054, abs=1e-4), pytest.approx(3.446, abs=1e-4)
    )
    assert row.loss[32] == Value(3.0), "one sequence has no error"


def test_stages_have_curves_and_speed(tmp_path):
    found = run_data(*write_run(tmp_path / "run"), "run")
    align = found.stages[0]
    assert (align.name, align.loss, align.seconds) == ("align", "align-mse", 9.0)
    assert align.losses == [(1.0, 1.0), (2.0, 0.5), (4.0, 0.25)]
    assert align.points["eval/align-mse"] == [(4.0, 0.3)]
    assert align.median("speed/tokens-per-second") == 20.0
    assert align.highest("speed/memory-gib") == 1.5 and align.median("speed/mfu") is None
    assert align.tokens == 2 * 16
    facts = dict(found.facts)
    assert facts["its tokens"] == "5,000" and facts["commit"] == "abc"
    assert "1 of 2 layers keep softmax attention (1)" in facts["student"]
    assert facts["layer selection"] == "method halo, 4.1k tokens read, 1m15s"
    assert found.selection_method == "halo"
    assert len(found.importance) == 2 and found.importance[1] > found.importance[0]
    # models are not in this folder, and that is said
    assert [line for line in found.missing if "size is left out" in line] == list(found.missing)


def test_what_an_older_run_lacks_is_said_and_the_rest_is_there(tmp_path):
    found = run_data(*write_run(tmp_path / "run", ROWS, old=True), "run")
    said = " ".join(found.missing)
    for word in ("no error bars", "align/losses.jsonl", "distill/metrics.jsonl", "scores.json"):
        assert word in said
    assert found.rows[0].loss == {16: Value(3.25)} and found.rows[0].recall[16] == Value(99.5)
    folder = RunFolder(tmp_path / "run")
    assert "another version" in " ".join(run_data(folder, None, "run").missing)


def test_damage_is_named(tmp_path):
    folder, run = write_run(tmp_path / "run")
    (folder.stage("align") / "metrics.jsonl").write_text("{\n")
    with pytest.raises(DataError, match="align/metrics.jsonl, line 1"):
        run_data(folder, run, "run")
    folder.report_file.write_text(
        json.dumps(content([{**NEW_ROWS[0], "loss_by_length": {"1": {"loss": "x"}}}]))
    )
    with pytest.raises(DataError, match="report.json: .*loss_by_length"):
        run_data(folder, run, "run")


def test_long_curves_are_averaged():
    points = [(float(step), float(step)) for step in range(1, 1001)]
    thin = thinned(points)
    assert len(thin) == 200 and thin[0] == (5.0, 3.0) and thin[-1] == (1000.0, 998.0)
    assert thinned(points[:150]) == points[:150] and thinned([]) == []
