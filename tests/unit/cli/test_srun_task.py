import json
import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_hypenet.cli import srun_task
from megatron_hypenet.errors import CheckpointError, SavedAndRequeue
from megatron_hypenet.supervision.fault_record import FaultRecord
from tests.unit.launchers.test_slurm import TASK, without_head


def test_a_fault_leaves_a_record(tmp_path):
    environment = {"HYPENET_ATTEMPT_LOGS": str(tmp_path), "RANK": "3", "SLURMD_NODENAME": "n2"}
    srun_task.record_fault(CheckpointError("teacher is gone"), environment)
    record = json.loads((tmp_path / "rank-0003.error.json").read_text())
    assert set(record) == set(FaultRecord.__slots__), "the schema of the engine's"
    assert {key: record[key] for key in ("rank", "host", "code", "error")} == {
        "rank": 3,
        "host": "n2",
        "code": 5,
        "error": "teacher is gone",
    }
    assert (
        "CheckpointError: teacher is gone" in record["traceback"]
        and abs(record["time"] - time.time()) < 60
    )


def test_the_record_of_the_engine_stays(tmp_path):
    (tmp_path / "rank-0003.error.json").write_text('{"echo": true}')
    srun_task.record_fault(
        CheckpointError("x"), {"HYPENET_ATTEMPT_LOGS": str(tmp_path), "RANK": "3"}
    )
    assert (tmp_path / "rank-0003.error.json").read_text() == '{"echo": true}'


def test_being_asked_to_stop_is_no_fault(tmp_path):
    srun_task.record_fault(
        SavedAndRequeue("saved"), {"HYPENET_ATTEMPT_LOGS": str(tmp_path), "RANK": "0"}
    )
    assert list(tmp_path.iterdir()) == []


def start(*words, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "launchers.slurm", *words],
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_without_srun_it_ends_with_code_4(tmp_path):
    process = start("config", "show", "x.yaml")
    assert (
        "was not started by srun" in process.communicate(timeout=60)[1] and process.returncode == 4
    )


def test_a_task_runs_the_command_and_reports_its_fault(tmp_path):
    process = start(
        "config",
        "validate",
        str(tmp_path / "no.yaml"),
        HYPENET_ATTEMPT_LOGS=str(tmp_path),
        SLURMD_NODENAME="n2",
        **TASK,
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3 and out == ""
    assert (
        "node n2 attempt 0 RANK=9 WORLD_SIZE=20 LOCAL_RANK=1 MASTER_ADDR=127.0.0.1 "
        "MASTER_PORT=20001" in err
    )
    assert (
        "no such configuration file"
        in json.loads((tmp_path / "rank-0009.error.json").read_text())["error"]
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_asked_to_stop_before_anything_runs(tmp_path, number):
    # a shell as `scontrol` that waits: the task is stopped while it looks for its head node
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho x > asked; sleep 30\n")
    (tmp_path / "scontrol").chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-m", "launchers.slurm", "doctor"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            **without_head(),
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.getcwd(),
        },
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "asked").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=30) == 75
    process.stderr.close()
