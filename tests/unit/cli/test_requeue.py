import pytest

from megatron_hypenet.cli import main as cli
from megatron_hypenet.cluster.jobs import Jobs
from tests.unit.cli.slurm_answers import Answers, attempt, run_with_jobs


@pytest.fixture
def answers(tmp_path, monkeypatch):
    return Answers(tmp_path, monkeypatch)


@pytest.fixture
def chain(tmp_path):
    return run_with_jobs(tmp_path / "run", (1, "align"), (2, "distill"), (3, "finetune"))


def test_a_running_job_goes_back_into_the_queue(chain, answers, capsys):
    answers.queue((1, "COMPLETED"), (2, "RUNNING"), (3, "PENDING"))
    assert cli.run(["requeue", str(chain)]) == 0
    assert answers.calls("scontrol") == ["scontrol requeue 2"]
    assert capsys.readouterr().out == "put back into the queue: job 2 (distill)\n"


def test_a_bad_node_is_avoided_by_all_that_follows(chain, answers):
    answers.queue((1, "COMPLETED"), (2, "RUNNING"), (3, "PENDING"))
    assert cli.run(["requeue", str(chain), "--exclude", "n7", "--exclude", "n9"]) == 0
    assert answers.calls("scontrol") == [
        "scontrol requeuehold 2",
        "scontrol update JobId=2 ExcNodeList=n7,n9",
        "scontrol release 2",
        "scontrol update JobId=3 ExcNodeList=n7,n9",
    ]


def test_an_ended_run_is_submitted_again_from_what_is_not_done(chain, answers, capsys):
    attempt(chain, 1, 0, "started on n1", "ended with code 0")
    attempt(chain, 2, 0, "started on n1", "ended with code 8")
    answers["sbatch"] = "expr 10 + $(grep -c sbatch $(dirname $0)/../calls)"
    assert cli.run(["requeue", str(chain), "--exclude", "n7"]) == 0
    assert (
        capsys.readouterr().out
        == "submitted again: job 11 (distill)\nsubmitted again: job 12 (finetune)\n"
    )
    assert [call.split(" ", 2)[2] for call in answers.calls("sbatch")] == [
        f"--exclude=n7 {chain}/job_distill.sbatch",
        "--dependency=afterok:11 --kill-on-invalid-dep=yes --exclude=n7 "
        f"{chain}/job_finetune.sbatch",
    ]
    assert [(job.id, job.part) for job in Jobs(chain).newest_of_each_part()] == [
        (1, "align"),
        (11, "distill"),
        (12, "finetune"),
    ]


def test_dry_run_does_nothing(chain, answers, capsys):
    assert cli.run(["requeue", str(chain), "--dry-run"]) == 0
    assert (
        answers.calls("sbatch") == []
        and "would be submitted again: job 1 (align)" in capsys.readouterr().out
    )


def test_a_run_that_is_done(chain, answers, capsys):
    answers.queue((1, "COMPLETED"), (2, "COMPLETED"), (3, "COMPLETED"))
    assert cli.run(["requeue", str(chain)]) == 0
    assert "nothing to start again" in capsys.readouterr().out and answers.calls("sbatch") == []


def test_the_stop_file_has_to_go_first(chain, answers, capsys):
    (chain / "STOP").touch()
    assert cli.run(["requeue", str(chain)]) == 2
    assert (
        "delete it to start or continue the run" in capsys.readouterr().err
        and answers.calls() == []
    )
