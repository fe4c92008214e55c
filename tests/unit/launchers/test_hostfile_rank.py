"""One slot of a hostfile: what it tells, what it hands on, and that its command never outlives the
connection."""

import json
import os
import signal
import subprocess
import sys

import pytest

from launchers.hostfile import packed
from launchers.hostfile_rank import MARK, environment_of
from launchers.local import held_port
from megatron_hypenet.errors import SetupError
from megatron_hypenet.process_place import under_way
from tests.unit.launchers.test_local import eventually, gone

DRIVER = """
import sys
from launchers import hostfile_rank
hostfile_rank.hypenet_command = lambda words: (sys.executable, "-u", "-c", *words)
hostfile_rank.main()
"""
PLACE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "4",
    "LOCAL_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
}


@pytest.fixture
def start(repo_root):
    """Start a slot whose command is a Python program, with pipes where ssh has them."""
    running = []

    def begin(code, *words, **more):
        with held_port() as port:
            environment = (
                os.environ | PLACE | {"MASTER_PORT": str(port), "PYTHONPATH": str(repo_root)} | more
            )
        command = [sys.executable, "-c", DRIVER, packed(code), *map(packed, words)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running.append(subprocess.Popen(command, env=environment, text=True, **pipes))
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.wait()


def reported(line):
    """Return the event in a line that begins with MARK."""
    assert line.startswith(MARK), line
    return json.loads(line.removeprefix(MARK))


def test_the_first_rank_writes_and_the_end_is_reported(start):
    slot = start(
        "import os, sys; print(sys.argv[1:], os.environ['LOCAL_WORLD_SIZE']); print('to stderr', "
        "file=sys.stderr)",
        "a b",
        "$c",
    )
    assert slot.wait(timeout=30) == 0
    out, said = slot.stdout.read(), slot.stderr.read()
    assert out == "['a b', '$c'] 2\n"
    first, middle, last = said.splitlines()
    assert (
        reported(first) == {"event": "started", "rank": 0, "pid": slot.pid}
        and middle == "to stderr"
    )
    assert reported(last) == {"event": "ended", "rank": 0, "code": 0, "tail": []}


def test_another_rank_keeps_its_words_until_it_fails(start):
    slot = start("print('x' * 5000); print('last words'); raise SystemExit(7)", RANK="3")
    assert reported(slot.stderr.readline())["event"] == "started"
    end = reported(slot.stderr.readline())
    # as much of the end as fits into one line
    assert (end["rank"], end["code"], end["tail"]) == (3, 7, ["last words"])
    assert slot.poll() is None, "it waits for leave to go, which ends the other slots of its host"
    out, _ = slot.communicate(timeout=30)
    assert slot.returncode == 7 and out == ""


def test_a_killed_command_and_what_it_left(start):
    code = (
        "import os, subprocess; print(subprocess.Popen(['sleep', '60']).pid); os.kill(os.getpid(), "
        "9)"
    )
    slot = start(code)
    left = int(slot.stdout.readline())
    slot.stderr.readline()
    assert reported(slot.stderr.readline())["code"] == 137
    eventually(lambda: gone(left))


@pytest.mark.parametrize("end", ["input", "output"])
def test_the_command_is_killed_with_the_connection(start, end):
    slot = start(
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print(os.getpid()); time.sleep(60)"
    )
    pid = int(slot.stdout.readline())
    (slot.stdin if end == "input" else slot.stdout).close()
    eventually(lambda: gone(pid) and slot.poll() is not None)


def test_the_command_dies_with_its_slot(start):
    slot = start("import os, time; print(os.getpid()); time.sleep(60)")
    pid = int(slot.stdout.readline())
    slot.kill()
    eventually(lambda: gone(pid))


def test_signals_are_handed_on(start):
    slot = start(
        "import signal, sys, time; signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75)); "
        "print('ready'); time.sleep(60)"
    )
    slot.stdout.readline()
    slot.send_signal(signal.SIGUSR2)
    slot.stderr.readline()
    assert reported(slot.stderr.readline())["code"] == 75


def test_a_place_that_cannot_be_taken():
    with pytest.raises(SetupError, match="did not say where this process belongs: 'RANK'"):
        environment_of({})
    with pytest.raises(
        SetupError, match=r"first host's address 'no-such-host.invalid' cannot be looked up on"
    ):
        environment_of({**PLACE, "MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "12345"})
    own = environment_of({**PLACE, "RANK": "1", "MASTER_PORT": "12345"})
    assert own["LOCAL_WORLD_SIZE"] == "2" and under_way(own)


def test_threads_are_shared_out_unless_the_user_did(monkeypatch):
    with held_port() as port:
        place = {**PLACE, "RANK": "1", "MASTER_PORT": str(port)}
        assert int(environment_of(place)["OMP_NUM_THREADS"]) >= 1
        assert "OMP_NUM_THREADS" not in environment_of({**place, "OMP_NUM_THREADS": "3"})
