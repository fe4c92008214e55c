import json
import os

import pytest

from megatron_hypenet.cli import main as cli
from tests.unit.cli.slurm_answers import attempt, run_with_jobs


def invoke(capsys, *words):
    code = cli.run([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def run(tmp_path):
    """Make two jobs; the first has started twice, the second not yet."""
    folder = run_with_jobs(tmp_path / "run", (1, "align"), (2, "distill"))
    for number in (0, 1):
        path = attempt(folder, 1, number)
        for rank in (0, 1):
            (path / f"rank-{rank:04d}.log").write_text(
                "".join(f"start {number} rank {rank} line {line}\n" for line in range(100))
            )
        os.utime(path)
    (folder / "logs" / "job-1.log").write_text("")
    return folder


def record(folder, rank, error="CheckpointError: gone"):
    content = {
        "rank": rank,
        "host": f"n{rank + 1}",
        "time": 1.0 + rank,
        "code": 5,
        "error": error,
        "traceback": f"Traceback\n  x\n{error}\n",
    }
    (folder / f"rank-{rank:04d}.error.json").write_text(json.dumps(content))


def test_the_end_of_rank_0_in_the_last_start(run, capsys):
    code, out, _ = invoke(capsys, "logs", run, "--lines", "2")
    assert (
        code == 0
        and out.endswith("start 1 rank 0 line 98\nstart 1 rank 0 line 99\n")
        and "ranks 0 to 1 are beside it" in out
    )
    assert json.loads(invoke(capsys, "logs", run, "--rank", "1", "-n", "1", "--json")[1])[
        "lines"
    ] == ["start 1 rank 1 line 99"]


def test_the_job_log_where_no_rank_started(run, capsys):
    (run / "logs" / "job-2.log").write_text("srun: error: no such program\n")
    assert "no such program" in invoke(capsys, "logs", run, "--job", "2")[1]


def test_first_error_groups_the_ranks_of_the_newest_start_that_failed(run, capsys):
    for rank in (0, 1):
        record(run / "logs" / "job-1" / "attempt-0", rank)
    code, out, _ = invoke(capsys, "logs", run, "--first-error")
    assert code == 0 and "job 1 (align), attempt 0" in out
    assert (
        "first: 2 ranks on 2 nodes (n1: 0, n2: 1): CheckpointError: gone\n    Traceback\n      x\n"
        in out
    )
    assert out.count("Traceback") == 1


def test_echoes_come_after_their_cause_and_without_traceback(run, capsys):
    logs = run / "logs" / "job-1" / "attempt-1"
    record(logs, 0, "RuntimeError: Connection closed by peer")
    record(logs, 1)
    out = invoke(capsys, "logs", run, "--first-error")[1]
    assert out.index("first: rank 1 on n2: CheckpointError: gone") < out.index(
        "then, as an echo: rank 0 on n1: RuntimeError: Connection closed"
    )
    assert out.count("Traceback") == 1


def test_no_fault_at_all(run, capsys):
    assert invoke(capsys, "logs", run, "--first-error")[:2] == (0, "no rank has reported a fault\n")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--rank", "7"], 2, "rank 7 has no log in .*attempt-1; ranks 0 to 1 have"),
        (["--job", "9"], 2, "has no job 9; it has 1, 2"),
    ],
)
def test_what_is_not_there_is_named(run, capsys, words, code, says):
    got, _, err = invoke(capsys, "logs", run, *words)
    assert got == code
    import re

    assert re.search(says, err)


def test_a_run_without_slurm_has_logs_too(tmp_path, capsys):
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").touch()
    assert "nothing has started yet" in invoke(capsys, "logs", folder)[1]
    (folder / "logs" / "hypenet.log").write_text("one\ntwo\nthree\n")
    code, out, _ = invoke(capsys, "logs", folder, "-n", "2")
    assert code == 0 and out.endswith("two\nthree\n") and "hypenet.log" in out
    assert json.loads(invoke(capsys, "logs", folder, "--json")[1])["lines"][-1] == "three"
    code, _, err = invoke(capsys, "logs", folder, "--rank", "1")
    assert code == 2 and "--first-error" in err
    assert "no rank has reported a fault" in invoke(capsys, "logs", folder, "--first-error")[1]
    start = {"command": "hypenet run x", "folder": "/", "host": "n1", "pid": 1, "processes": 1}
    start |= {"began": 1.0, "state": "failed", "ended": 2.0, "reason": "it is damaged"}
    (folder / "start.json").write_text(json.dumps(start))
    assert (
        "first: rank 0 on n1: it is damaged" in invoke(capsys, "logs", folder, "--first-error")[1]
    )
    found = json.loads(invoke(capsys, "logs", folder, "--first-error", "--json")[1])
    assert found["groups"][0]["error"] == "it is damaged"


def test_the_last_start_decides_whose_logs_are_shown(run, capsys):
    start = {"command": "hypenet run x", "folder": "/", "host": "n1", "pid": 1, "processes": 1}
    for job, shown in (("", "nothing has started yet"), ("1", "start 1 rank 0 line 99")):
        (run / "start.json").write_text(json.dumps({**start, "began": 1.0, "job": job}))
        assert shown in invoke(capsys, "logs", run)[1]


def test_nothing_has_started_yet(tmp_path, capsys):
    code, _, err = invoke(capsys, "logs", run_with_jobs(tmp_path / "run", (1, "run")))
    assert code == 5 and "has started yet" in err
