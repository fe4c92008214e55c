"""Owners are real processes here; those of other machines are files with other contents."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_hypenet import ownership
from megatron_hypenet.errors import UsageError
from megatron_hypenet.ownership import (
    FILE,
    owner_file,
    owning,
    refuse_if_owned,
    this_process,
    writing,
)

HOLD = """
import sys, time
from pathlib import Path
from megatron_hypenet.ownership import owning
with owning(Path(sys.argv[1]), inside=True):
    print("owned", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Provide a process that owns tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "owned\n"
    yield process
    process.kill()
    process.wait()


def plant(path: Path, **changes) -> dict:
    """Name another owner in the file, which nobody has locked."""
    record = asdict(replace(this_process(), **changes))
    path.write_text(json.dumps(record))
    return record


ELSEWHERE = {"host": "node7", "boot": "another/pid:[1]", "token": "theirs"}


def test_the_owner_is_named_while_the_block_runs_and_no_longer(tmp_path):
    with owning(tmp_path, inside=True):
        record = json.loads((tmp_path / FILE).read_text())
        assert (record["pid"], record["beat"]) == (os.getpid(), 0)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError), owning(tmp_path, inside=True):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_living_owner_is_named_in_the_refusal(tmp_path, holder):
    for attempt in (
        lambda: refuse_if_owned(tmp_path),
        lambda: owning(tmp_path, inside=True, patience_seconds=0).__enter__(),
    ):
        with pytest.raises(UsageError) as caught:
            attempt()
        for word in (str(tmp_path), f"process {holder.pid} on ", "since", FILE):
            assert word in str(caught.value)
    assert json.loads((tmp_path / FILE).read_text())["pid"] == holder.pid


def test_an_owner_that_was_killed_is_replaced_at_once(tmp_path, holder, caplog):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    refuse_if_owned(tmp_path)
    started = time.monotonic()
    with owning(tmp_path, inside=True):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    assert time.monotonic() - started < 1
    assert f"process {holder.pid} on" in caplog.text and "which is gone" in caplog.text


def test_waiting_for_an_owner_that_ends(tmp_path, holder):
    holder.send_signal(signal.SIGTERM)
    with owning(tmp_path, inside=True, patience_seconds=30):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 3}', "\0\0\0"])
def test_a_file_that_a_killed_process_left_unreadable_is_replaced(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with owning(tmp_path, inside=True):
        pass


def test_without_a_lock_the_process_table_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(
        ownership.fcntl,
        "flock",
        lambda *_: (_ for _ in ()).throw(OSError(ownership.errno.ENOLCK, "no locks")),
    )
    plant(tmp_path / FILE, token="theirs")  # this process
    with pytest.raises(UsageError, match=f"process {os.getpid()} on"):
        owning(tmp_path, inside=True, patience_seconds=0).__enter__()
    plant(tmp_path / FILE, token="theirs", started=5)  # its number, used again
    with owning(tmp_path, inside=True):
        pass


def test_an_owner_on_another_machine_is_gone_when_its_beat_stands_still(tmp_path, caplog):
    plant(tmp_path / FILE, **ELSEWHERE)
    refuse_if_owned(tmp_path)  # would take time to find out
    with owning(tmp_path, inside=True, watch_seconds=0.3):
        pass
    assert "waiting up to" in caplog.text and "on node7" in caplog.text


def test_an_owner_on_another_machine_lives_while_its_beat_grows(tmp_path, monkeypatch):
    record = plant(tmp_path / FILE, **ELSEWHERE)
    sleep = time.sleep

    def beat(seconds):
        (tmp_path / FILE).write_text(json.dumps({**record, "beat": record["beat"] + 1}))
        sleep(seconds)

    monkeypatch.setattr(ownership.time, "sleep", beat)
    with pytest.raises(UsageError, match="on node7"):
        owning(tmp_path, inside=True, watch_seconds=5, patience_seconds=0).__enter__()


STATES = {"RUNNING": False, "COMPLETING": False, "PENDING": True, "FAILED": True, "": True}


@pytest.mark.parametrize(("state", "known_over"), STATES.items())
def test_slurm_says_whether_a_job_is_over(tmp_path, monkeypatch, caplog, state, known_over):
    plant(tmp_path / FILE, **ELSEWHERE, job="4711")
    said = subprocess.CompletedProcess([], 0, stdout=f"{state}\n", stderr="")
    monkeypatch.setattr(ownership.subprocess, "run", lambda words, **_: said)
    # the process may have ended before its job
    with owning(tmp_path, inside=True, watch_seconds=0.2):
        pass
    assert ("waiting up to" in caplog.text) == (not known_over)


def test_what_a_shell_sets_for_squeue_does_not_end_a_job(tmp_path, monkeypatch, caplog):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text(
        '#!/bin/sh\n[ -z "$SQUEUE_USERS" ] && echo RUNNING\nexit 0\n'
    )
    (tmp_path / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("SQUEUE_USERS", "nobody")
    folder = tmp_path / "run"
    folder.mkdir()
    plant(folder / FILE, **ELSEWHERE, job="4711")
    with owning(folder, inside=True, watch_seconds=0.2):
        pass
    assert "waiting up to" in caplog.text  # the job runs, so its owner is watched


def test_a_job_that_slurm_started_again_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    plant(tmp_path / FILE, **ELSEWHERE, restarts=1)
    with owning(tmp_path, inside=True, watch_seconds=100):
        pass


def test_of_many_that_come_at_once_one_wins(tmp_path):
    plant(tmp_path / FILE, token="theirs", started=5)  # an owner that is gone
    code = HOLD.replace("time.sleep(60)", "time.sleep(3)")
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [
        subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for _ in range(4)
    ]
    codes = [process.wait() for process in processes]
    # those that start late may find the folder free again, but never two at a time: what each wrote
    # is gone
    assert 0 in codes and list(tmp_path.iterdir()) == []


def test_on_a_network_file_system_the_last_writer_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "_is_local", lambda path: False)
    monkeypatch.setattr(ownership, "_NETWORK_SETTLE_SECONDS", 0.1)
    with owning(tmp_path, inside=True):
        pass
    monkeypatch.setattr(ownership.time, "sleep", lambda _: plant(tmp_path / FILE, **ELSEWHERE))
    with pytest.raises(UsageError, match="on node7"):
        owning(tmp_path, inside=True, patience_seconds=0).__enter__()


def test_the_beat_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.05)
    with owning(tmp_path, inside=True):
        deadline = time.monotonic() + 5
        while (
            time.monotonic() < deadline
            and json.loads((tmp_path / FILE).read_text() or "{}").get("beat", 0) < 2
        ):
            time.sleep(0.02)
        assert json.loads((tmp_path / FILE).read_text())["beat"] >= 2


def test_an_owner_goes_on_where_its_record_does_not_fit_on_the_disk(tmp_path, monkeypatch):
    """A full disk leaves the file empty, which is no sign of another owner; the next beat that fits
    writes the record."""
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail(f"ended with code {code}"))
    write = ownership._write
    space = threading.Event()
    refused = []

    def on_a_small_disk(descriptor, owner):
        if not space.is_set():
            refused.append(owner.beat)
            raise OSError(errno.ENOSPC, "No space left on device")
        write(descriptor, owner)

    def wait_for(condition):
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    monkeypatch.setattr(ownership, "_write", on_a_small_disk)
    with owning(tmp_path, inside=True):
        wait_for(lambda: len(refused) > 3)
        assert (tmp_path / FILE).read_text() == ""
        space.set()
        wait_for(lambda: (tmp_path / FILE).read_text())
    assert not (tmp_path / FILE).exists()
    space.clear()
    with owning(tmp_path, inside=True):  # nor does a file stay that was never written
        pass
    assert not (tmp_path / FILE).exists()


def test_a_marker_that_is_no_ordinary_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / FILE)
    with pytest.raises(UsageError, match="not an ordinary file"):
        owning(tmp_path, inside=True, patience_seconds=0).__enter__()


def test_a_target_has_its_owner_beside_it_and_leftovers_go(tmp_path):
    (tmp_path / ".out.tmp-1").mkdir()
    with writing(tmp_path / "out"):
        assert owner_file(tmp_path / "out", inside=False).exists()
        assert not (tmp_path / ".out.tmp-1").exists()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with writing(tmp_path / "file" / "out"):  # nothing can be written there: the block says so
        pass


def test_a_target_inside_of_an_owned_folder_is_refused(tmp_path, holder):
    (tmp_path / "sub").mkdir()
    with (
        pytest.raises(UsageError, match=f"process {holder.pid} on"),
        writing(tmp_path / "sub" / "teacher"),
    ):
        pass


def test_an_owner_whose_file_is_gone_ends_at_once(tmp_path):
    code = HOLD.replace(
        "with owning",
        "from megatron_hypenet import ownership\nownership.BEAT_SECONDS = 0.05\nwith owning",
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "owned\n"
    (tmp_path / FILE).unlink()
    assert process.wait(10) == 2
    assert process.stderr is not None and "no longer names this process" in process.stderr.read()
