"""Whether a run is worked on, and how it goes on, from its files alone."""

import json
import subprocess
import sys
import time

import pytest

from megatron_hypenet.atomic_files import write_json
from megatron_hypenet.cluster.jobs import Job, JobState
from megatron_hypenet.cluster.run_state import (
    RunState,
    is_here,
    local_faults,
    run_folders,
    state_of,
)
from megatron_hypenet.errors import DataError
from megatron_hypenet.process_place import host_name

OWNER = """
import sys, time
from pathlib import Path
from megatron_hypenet.ownership import owning
with owning(Path(sys.argv[1]), inside=True):
    print("owned", flush=True)
    time.sleep(60)
"""


def started(folder, state, **more):
    """Write the record of a start."""
    content = {
        "command": "hypenet run demo.yaml",
        "folder": "/elsewhere",
        "host": "n1",
        "pid": 1,
        "processes": 1,
        "began": 100.0,
        "state": state,
        "ended": None if state == "running" else time.time() - 60,
    }
    write_json(folder / "start.json", {**content, **more})


@pytest.fixture
def owner(tmp_path):
    """Provide a process that works on the run."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "owned\n"
    yield process
    process.kill()
    process.wait()


def test_a_process_that_works_on_it(tmp_path, owner):
    started(tmp_path, "running")
    found = state_of(tmp_path, ["report"])
    assert (found.state, found.pid, found.host) == ("running", owner.pid, host_name())
    assert found.where == f"process {owner.pid} on {host_name()}" and is_here(found)
    assert found.go_on == ""
    owner.kill()
    owner.wait()
    found = state_of(tmp_path, [])
    assert found.state == "killed" and "process 1 on n1 is gone and left no word" in found.why
    assert found.go_on == "cd /elsewhere && hypenet run demo.yaml" and not is_here(found)


@pytest.mark.parametrize(
    ("state", "finished", "expected", "goes_on"),
    [
        ("done", ["report"], "done", False),
        ("done", ["align"], "ended", True),
        ("stopped", ["report"], "stopped", True),
        ("failed", [], "failed", True),
    ],
)
def test_a_run_at_rest(tmp_path, state, finished, expected, goes_on):
    started(tmp_path, state, reason="stopped at iter 5 on Ctrl-C")
    found = state_of(tmp_path, finished)
    assert found.state == expected and bool(found.go_on) == goes_on
    assert 55 < found.seconds_ago < 120
    if state in ("stopped", "failed"):
        assert found.why == "stopped at iter 5 on Ctrl-C"


def test_a_folder_of_an_older_version(tmp_path):
    assert state_of(tmp_path, []).state == "new"
    assert state_of(tmp_path, ["report"]) == RunState(state="done")
    found = state_of(tmp_path, ["align"])
    assert found.state == "stopped" and found.go_on == f"hypenet run {tmp_path}/config.yaml"


def test_slurm_knows_more(tmp_path):
    job = Job(id=7, part="run", script="job.sbatch", submitted="")
    for state, word in (("PENDING", "waiting"), ("RUNNING", "running")):
        states = {7: JobState(state=state, live=True, nodes="n[1-2]", reason="Priority")}
        found = state_of(tmp_path, [], [job], states)
        assert (found.state, found.where) == (word, "SLURM job 7 on n[1-2]")
    started(tmp_path, "stopped", job="7")
    found = state_of(tmp_path, [], [job], {7: JobState(state="FAILED", live=False)})
    assert found.go_on == f"hypenet requeue {tmp_path}"


def test_faults_are_those_of_the_last_start(tmp_path):
    assert local_faults(tmp_path) == []
    started(tmp_path, "failed", reason="it is damaged")
    assert local_faults(tmp_path)[0].first.error == "it is damaged"
    (tmp_path / "errors").mkdir()
    for rank, (life, moment, error) in enumerate(
        [("a", 150.0, "old"), ("b", 200.0, "cause"), ("b", 201.0, "Connection closed by peer")]
    ):
        content = {
            "life": life, "time": moment, "host": "n1", "rank": rank, "stage": "align",
            "phase": "save", "iteration": 1, "train_iters": 2, "type": "ValueError",
            "error": error, "code": 1, "echo": False, "traceback": "",
        }  # fmt: skip
        (tmp_path / "errors" / f"rank_{rank:05d}.json").write_text(json.dumps(content))
    assert [group.first.error for group in local_faults(tmp_path)] == [
        "cause",
        "Connection closed by peer",
    ]
    started(tmp_path, "stopped", began=300.0)
    assert local_faults(tmp_path) == []


def test_runs_are_found_below_a_folder_and_not_inside_of_runs(tmp_path):
    for place in ("a", "deep/b", "a/inside", "not", "too/deep/by/one"):
        (tmp_path / place).mkdir(parents=True)
        if place != "not":
            (tmp_path / place / "config.yaml").touch()
            (tmp_path / place / "logs").mkdir()
    assert run_folders(tmp_path) == [tmp_path / "a", tmp_path / "deep" / "b"]
    assert run_folders(tmp_path / "a") == [tmp_path / "a"]
    with pytest.raises(DataError, match="is not a folder"):
        run_folders(tmp_path / "none")
