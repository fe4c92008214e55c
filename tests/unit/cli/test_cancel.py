import json

import pytest

from megatron_hypenet.cli import main as cli
from tests.unit.cli.slurm_answers import Answers, run_with_jobs


@pytest.fixture
def answers(tmp_path, monkeypatch):
    return Answers(tmp_path, monkeypatch)


def test_living_jobs_are_cancelled_the_last_first(tmp_path, answers, capsys):
    folder = run_with_jobs(tmp_path / "run", (1, "align"), (2, "distill"), (3, "finetune"))
    answers.queue((1, "COMPLETED"), (2, "RUNNING"), (3, "PENDING"))
    assert cli.run(["cancel", str(folder)]) == 0
    assert answers.calls("scancel") == ["scancel 3 2"]
    assert (
        capsys.readouterr().out
        == "cancelled job 2 (distill, RUNNING)\ncancelled job 3 (finetune, PENDING)\n"
    )
    assert (
        "cancelled by" in (folder / "logs" / "job-2" / "events").read_text()
        and not (folder / "logs" / "job-1").exists()
    )


def test_dry_run_only_says_so(tmp_path, answers, capsys):
    folder = run_with_jobs(tmp_path / "run", (1, "align"))
    answers.queue((1, "RUNNING"))
    assert cli.run(["cancel", str(folder), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cancelled"] == [1]
    assert answers.calls("scancel") == [] and not (folder / "logs").exists()


def test_nothing_to_cancel(tmp_path, answers, capsys):
    folder = run_with_jobs(tmp_path / "run", (1, "align"))
    assert cli.run(["cancel", str(folder)]) == 0 and answers.calls("scancel") == []
    assert "no job waits or runs" in capsys.readouterr().out
