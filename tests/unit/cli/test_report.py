"""`hypenet report` as a user starts it."""

import json
import shutil

import pytest

from megatron_hypenet.cli.main import run
from tests import tiny_run


@pytest.fixture
def finished(tmp_path, monkeypatch, capsys):
    """Provide a finished run."""
    tiny_run.fake_material(monkeypatch)
    tiny_run.write_teacher(tmp_path / "qwen3")
    assert run(["run", str(tiny_run.write_config(tmp_path))]) == 0
    capsys.readouterr()
    return tmp_path / "run"


def test_a_report_is_shown_rebuilt_and_measured_again(finished, capsys):
    before = (finished / "report" / "report.json").read_bytes()
    (finished / "report" / "report.png").unlink()
    assert run(["report", str(finished)]) == 0
    assert "teacher" in capsys.readouterr().out and (finished / "report" / "report.png").is_file()
    assert (finished / "report" / "report.json").read_bytes() == before
    # the model card of an export by hand has the figures that the run's own export has
    card = (finished / "export" / "README.md").read_text().partition("## Figures")[2]
    assert "student after stage 3" in card
    words = ["convert", "export", str(finished), str(finished / "again")]
    assert run([*words, "--attn-logits-scaling", "hype 500"]) == 0
    assert (finished / "again" / "README.md").read_text().partition("## Figures")[2] == card
    assert run([*words, "--attn-logits-scaling", "off", "--overwrite"]) == 0
    assert "## Figures" not in (finished / "again" / "README.md").read_text()
    assert "the run's figures are of the logit scaling hype 500" in capsys.readouterr().err
    (finished / "report" / "report.json").unlink()
    assert run(["report", str(finished), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows == json.loads(before)["rows"]
    assert run(["report", str(finished), "--again"]) == 0


def test_a_page_is_written_and_two_runs_are_compared(finished, tmp_path, capsys):
    page = finished / "report" / "report.html"
    assert page.read_text().count("data:image/svg+xml") >= 4, "the run itself wrote it"
    page.unlink()
    other = tmp_path / "b" / "run"
    shutil.copytree(finished, other)
    assert run(["report", str(finished), "--compare", str(other)]) == 0
    both = finished / "report" / "compare_b_run.html"
    out = capsys.readouterr().out
    assert str(both) in out and str(both.with_suffix(".png")) in out
    assert "HypeNet runs" in both.read_text() and both.with_suffix(".png").is_file()
    (other / "report" / "report.json").unlink()
    assert run(["report", str(finished), "--compare", str(other)]) == 5
    assert "no report to compare with" in capsys.readouterr().err
    assert run(["report", str(finished), "--compare", str(tmp_path)]) == 5
    (finished / "config.yaml").open("a").write("later_setting: 1\n")
    assert run(["report", str(finished)]) == 0
    assert "another version" in page.read_text()


def test_unfinished_and_foreign_folders_are_refused(tmp_path, capsys):
    assert run(["report", str(tmp_path)]) == 5
    assert "not a run folder" in capsys.readouterr().err
    config = tiny_run.write_config(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config.read_text())
    assert run(["report", str(tmp_path / "run")]) == 5
    assert "align, select, distill, finetune not done" in capsys.readouterr().err
