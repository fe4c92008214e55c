"""Real processes of a small Python program in the place of `hypenet`: exit codes, signals, streams,
and that nobody is left behind."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launchers import local
from launchers.local import LocalLaunch, held_port, run, visible_gpus
from megatron_hypenet.process_place import under_way

PROGRAM = """
import os, signal, subprocess, sys, time
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.01)
def ready():
    open(f"ready{rank}", "w").write(str(os.getpid()))
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Make launches run `PROGRAM` + the given code in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def write(code):
        path = tmp_path / "program.py"
        path.write_text(PROGRAM + code)
        monkeypatch.setattr(
            local, "hypenet_command", lambda words: (sys.executable, str(path), *words)
        )
        return path

    return write


def gone(pid: int) -> bool:
    """Return whether the process ended (or is a zombie that another process has to reap)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def eventually(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def signal_when_ready(ranks, *numbers):
    """Send signals to this process once all `ranks` have written their ready files."""

    def send():
        eventually(
            lambda: all(
                Path(f"ready{rank}").exists() and Path(f"ready{rank}").read_text() for rank in ranks
            )
        )
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.3)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_every_process_knows_its_place(program, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    program(
        """
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
names.append("OMP_NUM_THREADS")
open(f"env{rank}", "w").write(" ".join([os.environ[name] for name in names] + sys.argv[1:]))
"""
    )
    assert run(LocalLaunch(("train", "x=1"), 3)) == 0
    seen = [Path(f"env{rank}").read_text().split() for rank in range(3)]
    assert [row[:5] for row in seen] == [
        [str(rank), str(rank), "3", "3", "127.0.0.1"] for rank in range(3)
    ]
    assert (
        len({row[5] for row in seen}) == 1
        and int(seen[0][6]) >= 1
        and seen[0][7:] == ["train", "x=1"]
    )


def test_a_thread_number_that_is_set_stays(monkeypatch):
    assert "OMP_NUM_THREADS" not in LocalLaunch((), 2).environment(0, 1, {"OMP_NUM_THREADS": "3"})
    assert under_way(LocalLaunch((), 2).environment(0, 1, {}))
    assert LocalLaunch((), 2).environment(0, 1, {})["OMP_NUM_THREADS"] == str(
        max(1, len(os.sched_getaffinity(0)) // 2)
    )


def test_streams_of_rank_0_pass_and_others_are_quiet(program, capfd):
    program("print(f'out {rank}'); print(f'err {rank}', file=sys.stderr)")
    assert run(LocalLaunch((), 2)) == 0
    assert capfd.readouterr() == ("out 0\n", "err 0\n")


@pytest.mark.parametrize("code", [1, 3, 7, 8, 75])
def test_the_exit_code_is_that_of_the_process(program, code):
    program(f"sys.exit({code})")
    assert run(LocalLaunch((), 2)) == code


def test_the_first_failure_decides_and_is_shown(program, capfd):
    program(
        """
if rank == 1:
    print("error: loss is nan", file=sys.stderr)
    sys.exit(7)
if size == 3 and rank == 2:
    wait_for("never")
if rank:
    wait_for("ready0")
else:
    time.sleep(1)
    ready()
    sys.exit(1)
"""
    )
    start = time.monotonic()
    assert run(LocalLaunch((), 3, grace_seconds=2.0)) == 7
    assert time.monotonic() - start < 8
    said = capfd.readouterr().err
    assert "process 1 of 3 ended first, with code 7; its last lines:\nerror: loss is nan\n" in said


def test_a_fault_of_its_own_outweighs_an_echo_that_came_first(program, capfd):
    program(
        "if rank == 1: print('lost rank 0', file=sys.stderr, flush=True); ready(); sys.exit(1)\n"
        "wait_for('ready1'); time.sleep(0.3); print('damaged', file=sys.stderr); sys.exit(5)"
    )
    assert run(LocalLaunch((), 2)) == 5
    assert capfd.readouterr().err == "damaged\n"


def test_what_all_processes_say_is_shown_once(program, capfd):
    program("print('error: diverged', file=sys.stderr); time.sleep(0.5 * (rank == 0)); sys.exit(7)")
    assert run(LocalLaunch((), 2)) == 7
    assert capfd.readouterr().err == "error: diverged\n"


def test_a_process_that_ignores_sigterm_is_killed(program):
    program(
        "if rank == 0: wait_for('ready1'); sys.exit(3)\nsignal.signal(signal.SIGTERM, "
        "signal.SIG_IGN); ready(); wait_for('never')"
    )
    assert run(LocalLaunch((), 2, grace_seconds=0.5)) == 3
    eventually(lambda: gone(int(Path("ready1").read_text())))


def test_saving_takes_its_time(program):
    """A process that is done with code 75 does not end another one that still writes."""
    program("if rank == 0: sys.exit(75)\ntime.sleep(1.5); open('written', 'w'); sys.exit(75)")
    assert run(LocalLaunch((), 2, grace_seconds=0.2)) == 75
    assert Path("written").exists()


def test_a_crash_while_others_save_is_not_a_clean_stop(program):
    program("if rank == 0: sys.exit(75)\ntime.sleep(0.5); sys.exit(5)")
    assert run(LocalLaunch((), 2)) == 5


def test_death_by_a_signal_is_128_plus_its_number(program):
    program("os.kill(os.getpid(), signal.SIGSEGV if rank else signal.SIGCONT); wait_for('never')")
    assert run(LocalLaunch((), 2, grace_seconds=0.3)) == 128 + signal.SIGSEGV


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_requests_to_stop_reach_every_process(program, number):
    program(
        f"signal.signal({int(number)}, lambda *_: (open(f'asked{{rank}}', 'w'), sys.exit(75))); "
        "ready(); wait_for('never')"
    )
    sender = signal_when_ready(range(2), number)
    assert run(LocalLaunch((), 2)) == 75
    sender.join()
    assert Path("asked0").exists() and Path("asked1").exists()
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_the_keyboard_stops_all_and_twice_kills(program):
    program("ready()\ntry: wait_for('never')\nexcept KeyboardInterrupt: sys.exit(130)")
    sender = signal_when_ready(range(2), signal.SIGINT)
    assert run(LocalLaunch((), 2)) == 130
    sender.join()
    for path in Path().glob("ready*"):
        path.unlink()
    program("signal.signal(signal.SIGINT, signal.SIG_IGN); ready(); wait_for('never')")
    sender = signal_when_ready(range(2), signal.SIGINT, signal.SIGINT)
    assert run(LocalLaunch((), 2)) == 130
    sender.join()


def test_signals_that_are_ignored_stay_so(program, monkeypatch):
    """The processes inherit ignored signals, as under nohup, and go on."""
    program("ready(); wait_for('go')")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def send():
        while not Path("ready1").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGHUP)
        Path("go").touch()

    sender = threading.Thread(target=send)
    sender.start()
    try:
        assert run(LocalLaunch((), 2)) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
        sender.join()


def test_what_a_process_leaves_behind_is_ended(program):
    program(
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        "open(f'pid{rank}', 'w').write(str(child.pid))"
    )
    assert run(LocalLaunch((), 2)) == 0
    eventually(lambda: all(gone(int(Path(f"pid{rank}").read_text())) for rank in range(2)))


def test_processes_die_with_a_launcher_that_is_killed(program, repo_root, tmp_path):
    path = program("ready(); wait_for('never')")
    starter = (
        f"from launchers import local; local.hypenet_command = lambda w: ({sys.executable!r}, "
        f"{str(path)!r}); "
    )
    starter += "local.run(local.LocalLaunch((), 2))"
    launcher = subprocess.Popen(
        [sys.executable, "-c", starter],
        env={**os.environ, "PYTHONPATH": str(repo_root), "TMPDIR": str(tmp_path)},
    )
    eventually(
        lambda: all(
            Path(f"ready{rank}").exists() and Path(f"ready{rank}").read_text() for rank in range(2)
        )
    )
    launcher.kill()
    launcher.wait()
    for rank in range(2):
        eventually(lambda rank=rank: gone(int(Path(f"ready{rank}").read_text())))


def test_the_port_is_held_and_can_be_listened_on():
    with held_port() as port, held_port() as other:
        assert port != other
        with socket.socket(socket.AF_INET) as store:  # as the first process does
            store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            store.bind(("127.0.0.1", port))
            store.listen()
            socket.create_connection(("127.0.0.1", port), timeout=5).close()


def test_dry_run_says_everything(capsys):
    launch = LocalLaunch(("score", "a b"), 2)
    content = launch.describe()
    assert content["command"].endswith("-m megatron_hypenet score 'a b'")
    assert [own["RANK"] for own in content["processes"]] == ["0", "1"]
    lines = launch.lines()
    assert (
        len(lines) == 3
        and "2 times" in lines[0]
        and "RANK=1" in lines[2]
        and "MASTER_PORT='a free port'" in lines[2]
    )


@pytest.mark.parametrize(
    ("devices", "count"),
    [(None, 2), ("0", 1), ("0,1", 2), ("", 0), ("-1", 0), ("1,-1,0", 1), ("GPU-a,GPU-b", 2)],
)
def test_visible_gpus(tmp_path, monkeypatch, devices, count):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: GPU-a)'\necho 'GPU 1: B (UUID: GPU-b)'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert visible_gpus({} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}) == count


def test_a_driver_that_does_not_answer_means_no_gpus(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}) == 0
