"""A whole job of real slots in the place of DeepSpeed's launcher and pdsh: codes, words, signals,
lost connections, and nobody left."""

import os
import sys
from pathlib import Path

import pytest

from launchers import hostfile_job
from launchers.hostfile import Host, HostfileLaunch, packed
from launchers.local import held_port
from megatron_hypenet.errors import SetupError
from tests.unit.launchers.test_hostfile_rank import DRIVER
from tests.unit.launchers.test_local import eventually, gone, signal_when_ready

RUNNER = """
import os, signal, subprocess, sys
print("[2026-01-01 00:00:00,000] [INFO] [runner.py:1:main] cmd = pdsh", flush=True)
def slot(rank):
    place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "1"}
    words = [sys.executable, "-c", DRIVER, *sys.argv[1:]]
    return subprocess.Popen(words, env={**os.environ, **place}, stdin=subprocess.PIPE)
"""
BOTH = "codes = [process.wait() for process in [slot(0), slot(1)]]; sys.exit(max(codes))"
PROGRAM = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
open(f"ready{rank}", "w").write(str(os.getpid()))
"""


@pytest.fixture
def job(tmp_path, monkeypatch, repo_root):
    """Run a program in both slots; `runner` is the code that starts them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ssh").write_text(
        '#!/bin/sh\necho "$@" >>asked\nwhile [ "$1" = -o ]; do shift 2; done; shift; exec "$@"\n'
    )
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(repo_root))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")

    def run(code, runner=BOTH, grace=2.0):
        with held_port() as port:
            monkeypatch.setenv("MASTER_PORT", str(port))
        words = [
            sys.executable,
            "-c",
            f"DRIVER = {DRIVER!r}\n{RUNNER}\n{runner}",
            packed(PROGRAM + code),
        ]
        monkeypatch.setattr(HostfileLaunch, "command", property(lambda launch: words))
        hosts = (Host("first", 1), Host("second", 1))
        launch = HostfileLaunch(
            words=(),
            hostfile=Path("hosts"),
            hosts=hosts,
            address="first",
            port=1,
            variables={"NCCL_X": "1"},
            grace_seconds=grace,
        )
        return hostfile_job.run(launch)

    return run


def test_the_first_rank_writes_for_all(job, capfd):
    assert job("print('result', rank); print('progress', rank, file=sys.stderr)") == 0
    said = capfd.readouterr()
    assert (said.out, said.err) == ("result 0\n", "progress 0\n")


def test_last_words_are_heard(job, capfd):
    slow = (
        "import time; [process.wait() for process in (slot(0), slot(1))]; time.sleep(1); "
        "print('still on its way')"
    )
    assert job("", slow) == 0 and capfd.readouterr().out == "still on its way\n"


def test_the_launcher_gets_variables_by_a_private_file_and_no_secrets(job, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t")
    code = (
        "open('seen', 'w').write(open(path := os.environ['DS_ENV_FILE']).read() + "
        "oct(os.stat(path).st_mode & 0o777))"
    )
    assert job("", f"{code}; assert 'MLFLOW_TRACKING_TOKEN' not in os.environ; {BOTH}") == 0
    assert Path("seen").read_text() == "NCCL_X=1\n0o600"


def test_the_code_and_the_words_of_the_rank_that_failed(job, capfd):
    code = (
        "\nif rank: print('what went wrong'); sys.exit(7)\nsignal.signal(signal.SIGTERM, "
        "signal.SIG_IGN); time.sleep(60)"
    )
    assert job(code) == 7
    assert (
        capfd.readouterr().err
        == "process 1 of 2, on second, ended first, with code 7; its last lines:\nwhat went wrong\n"
    )
    assert all(gone(int(Path(f"ready{rank}").read_text())) for rank in (0, 1))
    assert "first kill -s KILL" in Path("asked").read_text()


def test_a_killed_rank_outweighs_its_echo(job, capfd):
    assert (
        job(
            "\nif rank: time.sleep(0.7); os.kill(os.getpid(), 9)\nprint('error: "
            "my partner is gone'); sys.exit(1)"
        )
        == 137
    )
    said = capfd.readouterr()
    assert said.out == "error: my partner is gone\n" and said.err.startswith(
        "process 1 of 2, on second, ended first, with code 137 (SIGKILL: "
    )


def test_what_all_agree_on_is_waited_for(job, capfd):
    assert (
        job("\nif rank == 0: time.sleep(3)\nopen(f'saved{rank}', 'w'); sys.exit(75)", grace=0.5)
        == 75
    )
    assert Path("saved0").exists() and capfd.readouterr().err == ""


def test_a_signal_reaches_the_first_rank(job):
    sender = signal_when_ready((0, 1), 15)
    code = """
def leave(number, frame):
    open("asked0", "w").close()
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
while not os.path.exists("asked0"):
    time.sleep(0.01)
sys.exit(75)
"""
    assert job(code.replace("open", "rank == 0 and open", 1)) == 75
    sender.join()
    assert "first kill -s TERM" in Path("asked").read_text()


def test_a_second_interrupt_ends_all(job):
    sender = signal_when_ready((0, 1), 2, 2)
    assert job("signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)") == 130
    sender.join()
    eventually(lambda: all(gone(int(Path(f"ready{rank}").read_text())) for rank in (0, 1)))


def test_a_launcher_that_fails_is_quoted(job):
    with pytest.raises(SetupError) as error:
        job("", "sys.exit(3)")
    assert (
        str(error.value).splitlines()[0]
        == "DeepSpeed's launcher ended with code 3 before the processes did; it and pdsh said last:"
    )
    assert "cmd = pdsh" in str(error.value)


def test_a_connection_that_ends_first(job):
    runner = (
        "first = slot(0); import time; time.sleep(2); "
        "print('pdsh@here: second: ssh exited with exit code 255', file=sys.stderr, flush=True); "
        "first.wait()"
    )
    with pytest.raises(
        SetupError, match="the connection to second ended with code 255 before its processes did"
    ):
        job("time.sleep(60)", runner, grace=0.5)
    assert gone(int(Path("ready0").read_text()))


def test_all_end_with_the_command_that_is_killed(job):
    pid = os.fork()
    if pid == 0:
        job("time.sleep(60)")
        os._exit(1)
    eventually(
        lambda: all(
            Path(f"ready{rank}").exists() and Path(f"ready{rank}").read_text() for rank in (0, 1)
        )
    )
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    eventually(lambda: all(gone(int(Path(f"ready{rank}").read_text())) for rank in (0, 1)))
