import json
import subprocess
import sys

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


OWNER = """
import signal, sys, time
from pathlib import Path
from megatron_hypenet.ownership import owning
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
with owning(Path(sys.argv[1]), inside=True):
    print("owned", flush=True)
    time.sleep(60)
"""


def test_a_run_without_slurm_is_asked_to_save_and_stop(tmp_path, capsys):
    (tmp_path / "config.yaml").touch()
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "owned\n"
        assert cli.run(["cancel", str(tmp_path), "--dry-run", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["process"] == process.pid
        assert process.poll() is None
        assert cli.run(["cancel", str(tmp_path)]) == 0
        assert "asked to save and stop" in capsys.readouterr().out
        assert process.wait(timeout=60) == 75
    finally:
        process.kill()
        process.wait()
    assert cli.run(["cancel", str(tmp_path)]) == 0
    assert "no process works on it" in capsys.readouterr().out


def test_a_process_of_another_machine_is_named(tmp_path, capsys):
    (tmp_path / "config.yaml").touch()
    owner = {
        "host": "far", "boot": "x", "pid": 7, "started": 1, "command": "hypenet run",
        "since": "2026-01-01T00:00:00+00:00", "token": "t",
    }  # fmt: skip
    (tmp_path / "owner.json").write_text(json.dumps(owner))
    assert cli.run(["cancel", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "process 7 on far works on it" in said and str(tmp_path / "STOP") in said
