import json
import time

import pytest

from megatron_hypenet.cli import main as cli
from megatron_hypenet.cluster import faulty_nodes
from megatron_hypenet.cluster.faulty_nodes import FaultyNode, faulty, forgive, left_out, note
from megatron_hypenet.cluster.jobs import Jobs
from tests.unit.cli.slurm_answers import Answers, attempt, run_with_jobs

LOST = "srun: error: Node failure on n3\n"
KILLED = "srun: error: n4: task 1: Killed\n"


@pytest.fixture
def answers(tmp_path, monkeypatch):
    return Answers(tmp_path, monkeypatch)


@pytest.fixture
def run(tmp_path):
    """Provide the folder of a run with a job that has ended."""
    (tmp_path / "runs").mkdir()
    return run_with_jobs(tmp_path / "runs" / "a", (1, "run"))


def start(run, number, said):
    """Record a start of job 1 on n3 and n4 in which srun said this."""
    logs = attempt(run, 1, number, "started on n[3-4]", "ended with code 137")
    for rank, node in enumerate(("n3", "n4")):
        (logs / f"rank-{rank:04d}.log").write_text(f"node {node} attempt {number} RANK={rank}\n")
    with (run / "logs" / "job-1.log").open("a") as log:
        log.write(f"2026 attempt {number}: started on n[3-4]\n{said}")
        log.write(f"2026 attempt {number}: ended with code 137\n")
    return logs


def names(run):
    return [one.node for one in faulty(Jobs(run))]


def test_a_lost_node_and_one_whose_tasks_are_killed_again_are_faulty(run):
    start(run, 0, KILLED)
    assert names(run) == []
    start(run, 1, LOST)
    assert names(run) == ["n3"]
    start(run, 2, KILLED)
    found = {one.node: one.why for one in faulty(Jobs(run))}
    assert found == {
        "n3": "its node failed: SLURM reached it no more",
        "n4": "tasks on it were killed in 2 starts",
    }


@pytest.mark.parametrize(
    ("error", "node"),
    [
        ("rank 0 on n4 hangs, waits\n  rank 1 on n9 (pid 7) does not answer: its process", "n9"),
        ("RuntimeError: CUDA error: uncorrectable ECC error encountered", "n4"),
        ("ValueError: this shard cannot be read", None),
        ("DivergedError: the loss is nan", None),
    ],
)
def test_errors_that_another_node_would_make_too_blame_nobody(run, error, node):
    record = {"rank": 1, "host": "n4", "time": time.time(), "error": error}
    (start(run, 0, "") / "rank-0001.error.json").write_text(json.dumps(record))
    assert names(run) == ([] if node is None else [node])


def test_a_node_is_slow_when_the_log_says_so_again_and_again(run):
    log = run / "logs" / "hypenet.log"
    log.parent.mkdir()
    line = "2026-11-26T10:0{}:00   iter {}/9 | loss 3.2 | slow: rank 3 on n7 1.6x | whole run: 1h\n"
    log.write_text("".join(line.format(count, count) for count in range(2)))
    assert names(run) == []
    log.write_text("".join(line.format(count, count) for count in range(3)))
    assert names(run) == ["n7"]


def test_what_doctor_noted_counts_for_the_runs_of_its_folder_up_to_the_limit(run):
    now = time.time()
    nodes = [FaultyNode(node=f"n{count}", why="slow", time=now - count) for count in range(4)]
    note(run.parent, nodes)
    note(run, [FaultyNode(node="n3", why="again", time=now + 1)])
    assert names(run) == ["n3", "n0", "n1", "n2"]
    assert left_out(Jobs(run), 2) == ("n3", "n0") and left_out(Jobs(run), 0) == ()


def test_a_forgiven_node_is_used_until_something_new_is_held_against_it(run):
    note(run, [FaultyNode(node="n1", why="slow", time=time.time())])
    forgive(run, ["n1"])
    assert names(run) == []
    note(run, [FaultyNode(node="n1", why="slow", time=time.time() + 1)])
    assert names(run) == ["n1"]


def test_requeue_leaves_them_out_status_shows_them_and_include_takes_them_back(
    run, answers, capsys
):
    start(run, 0, LOST)
    jobs = Jobs(run)
    answers["sbatch"] = "expr 10 + $(grep -c sbatch $(dirname $0)/../calls)"
    jobs.submit(run / "job_run.sbatch", "run", after=None, exclude=["n8"], exclude_faulty=1)
    assert jobs.all[-1].left_out == ("n3",) and jobs.all[-1].exclude == ("n8",)
    assert cli.run(["requeue", str(run)]) == 0
    assert [call.split()[2] for call in answers.calls("sbatch")] == ["--exclude=n8,n3"] * 2
    capsys.readouterr()
    assert cli.run(["status", str(run)]) == 0
    assert "left out     n3: its node failed" in capsys.readouterr().out
    assert cli.run(["requeue", str(run), "--include", "n3"]) == 0
    assert answers.calls("sbatch")[-1].split()[2] == "--exclude=n8"
    assert names(run) == []


def test_a_waiting_job_is_told_of_what_was_found_since(run, answers, capsys):
    answers["sbatch"] = "echo 11"
    jobs = Jobs(run)
    jobs.submit(run / "job_run.sbatch", "run", after=None, exclude=[], exclude_faulty=2)
    answers.queue((11, "PENDING"))
    note(run, [FaultyNode(node="n5", why="doctor: slow", time=time.time())])
    assert cli.run(["requeue", str(run)]) == 0
    assert answers.calls("scontrol") == ["scontrol update JobId=11 ExcNodeList=n5"]
    assert "told to avoid n5: job 11 (run)" in capsys.readouterr().out


def test_a_damaged_note_is_named(run, answers, capsys):
    (run / faulty_nodes.FILE).write_text("[")
    assert cli.run(["status", str(run)]) == 5
    assert "delete it to forget these nodes" in capsys.readouterr().err
