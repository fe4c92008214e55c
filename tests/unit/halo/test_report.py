"""The content of report.json."""

import json

import pytest

from megatron_hypenet.errors import DataError
from megatron_hypenet.halo import report
from megatron_hypenet.halo.run_folder import RunFolder
from tests.unit.halo.test_run_folder import config

ROWS = [
    {
        "model": "teacher",
        "heldout_loss": 3.25,
        "heldout_accuracy": 40.0,
        "recall": {"1": 99.5, "2": 3.0},
    },
    {
        "model": "student",
        "heldout_loss": 3.3,
        "heldout_accuracy": 39.0,
        "recall": {"1": 97.0, "2": 80.0},
    },
]
RECORDS = {
    "probe": {"seconds": 1.0, "teacher_loss": 3.1},
    "align": {"seconds": 2.5},
    "select": {"seconds": 3.0, "method": "kl", "tokens": 4096, "scoring_seconds": 2.75},
    "report": {"seconds": 100.0},
}


def test_the_report_holds_rows_selection_and_times(tmp_path):
    selection = {"attention_layers": [1], "mixer_types": ["lightning_attn", "attn"]}
    content = report.report_of(config(tmp_path), ROWS, selection, RECORDS, 4.0)
    assert content["rows"] == ROWS and content["attention_layers"] == [1]
    assert (
        content["step_seconds"] == {"probe": 1.0, "align": 2.5, "select": 3.0, "report": 4.0}
        and content["seconds"] == 10.5
    )
    assert content["selection"] == {"method": "kl", "tokens": 4096, "seconds": 2.75}
    assert content["teacher_probe_loss"] == 3.1 and "torch" in content["software"]["versions"]
    json.dumps(content)


def test_the_report_is_written_into_the_run_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.prepare(config(folder.root))
    folder.mixers_file.parent.mkdir()
    folder.mixers_file.write_text('{"mixer_types": ["attn"], "attention_layers": [0]}')
    folder.record("align", "f", seconds=2.0, software={})
    report.write_report(config(folder.root), folder, ROWS, report_seconds=1.0)
    content = json.loads(folder.report_file.read_text())
    assert content["seconds"] == pytest.approx(3.0) and content["rows"] == ROWS


def test_a_report_is_about_the_checkpoints_that_its_run_ended_with(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.prepare(config(folder.root))
    rows = [{**ROWS[1], "model": report.student_row(stage)} for stage in ("distill", "finetune")]
    assert [row["model"] for row in rows] == ["student after stage 2", "student after stage 3"]
    content = {"rows": [ROWS[0], *rows], "seq_length": 16, "attention_layers": [0], "seconds": 1.0}
    folder.report_file.parent.mkdir()
    folder.report_file.write_text(json.dumps(content))
    last = "finetune/checkpoints/iter_0000002"
    for stage in ("distill", "finetune"):
        place = f"{stage}/checkpoints/iter_0000002"
        folder.record(stage, "f", seconds=2.0, software={}, checkpoint=place)
    assert report.report_on(folder, folder.root / last) is None  # of an unfinished run
    folder.record("report", "f", seconds=2.0, software={})
    assert report.report_on(folder, folder.root / last) == content
    earlier = report.report_on(folder, folder.root / "distill/checkpoints/iter_0000002")
    assert earlier["rows"] == content["rows"][:2]
    for other in ("finetune/checkpoints/iter_0000001", "assembled"):
        assert report.report_on(folder, folder.root / other) is None


def test_a_row_reads_as_one_line():
    assert (
        report.row_line(ROWS[1]) == "student: held-out loss 3.3000, recall in %: 1x 97.0, 2x 80.0"
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rows": []}, "rows: "),
        ({"rows": [{**ROWS[0], "heldout_loss": None}]}, "heldout_loss"),
        ({"rows": [ROWS[0], {**ROWS[1], "recall": {"1": 1.0}}]}, "different context lengths"),
        ({"rows": [{**ROWS[0], "recall": {"x": 1.0}}]}, "recall"),
        ({"seq_length": 10**90}, "seq_length"),
        ({"attention_layers": 3}, "attention_layers"),
    ],
)
def test_a_damaged_report_is_named(tmp_path, change, says):
    folder = RunFolder(tmp_path)
    folder.report_file.parent.mkdir()
    content = {"rows": ROWS, "seq_length": 16, "attention_layers": [0], "seconds": 1.0}
    folder.report_file.write_text(json.dumps(content))
    assert report.read_report(folder) == content
    folder.report_file.write_text(json.dumps({**content, **change}))
    with pytest.raises(DataError, match="report.json: .*--again") as caught:
        report.read_report(folder)
    assert says in str(caught.value)
