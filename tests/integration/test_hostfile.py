"""A stage on two hosts of a hostfile, through DeepSpeed's launcher, pdsh and ssh: the losses of a
run on one machine, whatever happens.

The hosts are two addresses of this machine behind an sshd that this test starts: own port, own
keys, nothing of the system's ssh is used.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STEPS = 80
TINY = f"""configs/run/demo.yaml --stage align --pp 2
align.train_iters={STEPS} align.log_interval=10 align.warmup_iters=1 align.save_interval=20
align.seq_length=128 align.global_batch_size=8 guard.max_teacher_loss=100
select.recall_sequences=2 select.heldout_sequences=2
eval.recall_sequences=2 eval.heldout_sequences=2""".split()

OURS = {"OMP_NUM_THREADS": "1", "HYPENET_NOTE": 'a "b" $c 100%', "HF_TOKEN": "token-of-mine"}
"""Set where the command starts: a number, a text that shells and pdsh would change, and a
secret."""

SSHD = """
Port {port}
ListenAddress 127.0.0.1
ListenAddress 127.0.0.2
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
Match LocalAddress 127.0.0.1
  SetEnv SLURMD_NODENAME=node1
Match LocalAddress 127.0.0.2
  SetEnv SLURMD_NODENAME=node2
"""
"""The names are what heartbeats and errors call the hosts: ranks on two of them cannot look at each
other's processes."""
SSH = """
Host first
  HostName 127.0.0.1
Host second
  HostName 127.0.0.2
Host closed
  HostName 127.0.0.3
Host *
  Port {port}
  IdentityFile {folder}/user_key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile {folder}/known_hosts
  LogLevel ERROR
"""


@pytest.fixture(scope="module")
def ssh(tmp_path_factory):
    """Provide a folder with the ssh settings by which `first` and `second` are this machine."""
    folder = tmp_path_factory.mktemp("ssh")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name in ("host_key", "user_key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True
        )
    (folder / "sshd_config").write_text(SSHD.format(port=port, folder=folder))
    (folder / "ssh_config").write_text(SSH.format(port=port, folder=folder))
    (folder / "hosts").write_text("# two hosts\nfirst slots=1\nsecond slots=1\n")
    if os.getuid() == 0:
        # sshd wants this empty folder to be there, whatever its settings
        Path("/run/sshd").mkdir(exist_ok=True)
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    with (folder / "sshd.log").open("wb") as log:
        server = subprocess.Popen(
            [program, "-D", "-e", "-f", str(folder / "sshd_config")],
            stdin=subprocess.DEVNULL,
            stderr=log,
        )
    try:
        until(
            lambda: (
                subprocess.run(
                    ["ssh", "-F", str(folder / "ssh_config"), "second", "true"], capture_output=True
                ).returncode
                == 0
            )
        )
        yield folder
    finally:
        server.terminate()
        server.wait()


def until(condition, seconds=240.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def lines_of(path):
    return path.read_text().count("\n") if path.exists() else 0


def command_lines():
    """Yield the command lines of all processes, as every user can read them."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.read_text(errors="replace")


@pytest.fixture
def train(tmp_path, repo_root, ssh):
    """Start the stage in a folder; with a hostfile unless other words are given."""

    def start(folder, *words):
        words = words or ("--launcher", "hostfile", "--hostfile", str(ssh / "hosts"))
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "megatron_hypenet",
                "train",
                *TINY,
                f"output_dir={tmp_path / folder}",
                *words,
            ],
            cwd=repo_root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | OURS | {"PDSH_SSH_ARGS_APPEND": f"-F {ssh}/ssh_config"},
        )

    return start


@pytest.mark.timeout(900)
def test_two_hosts_go_the_way_of_one_machine(train, tmp_path, ssh, capsys):
    """Stopped by a signal to a rank, asked to leave, killed: each time the command ends as
    promised, and at last it has the same losses."""
    alone = train("alone", "--nproc", "2")
    assert alone.wait(timeout=200) == 0, alone.stderr.read()
    losses = tmp_path / "hosts" / "align" / "losses.jsonl"
    beats = tmp_path / "hosts" / "heartbeat"

    def of_second_host(job):
        """Return the heartbeat of the second host's rank, once the job has done three steps."""
        before = lines_of(losses)
        until(lambda: job.poll() is not None or lines_of(losses) > before + 2)
        assert job.poll() is None, job.stderr.read()
        return json.loads((beats / "rank_00001.json").read_text())

    hung = train(
        "hosts",
        "guard.hang_timeout_seconds=6",
        "--launcher",
        "hostfile",
        "--hostfile",
        str(ssh / "hosts"),
    )
    victim = of_second_host(hung)
    at = time.monotonic()
    os.kill(victim["pid"], signal.SIGSTOP)
    _, said = hung.communicate(timeout=200)
    seconds = time.monotonic() - at
    assert (
        hung.returncode == 8
        and f"rank 1 on node2 (pid {victim['pid']}) does not answer: its process is stopped or dead"
        in said
    ), said
    # on any host
    until(lambda: not any(str(tmp_path) in words for words in command_lines()), seconds=20)
    with capsys.disabled():
        print(
            "\nSIGSTOP of a rank on another host (limit 6 s): exit 8, "
            f"the command ended {seconds:.1f} s after it"
        )

    asked = train("hosts")
    of_second_host(asked)
    asked.send_signal(signal.SIGTERM)
    _, said = asked.communicate(timeout=200)
    stopped_at = lines_of(losses)
    assert (
        asked.returncode == 75
        and f"stopped at iter {stopped_at}/{STEPS} on SIGTERM" in said
        and stopped_at < STEPS
    ), said

    killed = train("hosts")
    victim = of_second_host(killed)
    theirs = dict(
        text.split("=", 1)
        for text in Path(f"/proc/{victim['pid']}/environ").read_text().split("\0")
        if text
    )
    assert theirs["HYPENET_NOTE"] == OURS["HYPENET_NOTE"] and "HF_TOKEN" not in theirs
    assert not any(OURS["HF_TOKEN"] in words for words in command_lines())
    at = time.monotonic()
    os.kill(victim["pid"], signal.SIGKILL)
    _, said = killed.communicate(timeout=200)
    seconds = time.monotonic() - at
    assert killed.returncode == 137 and seconds < 60, said
    (error,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert (
        "another process of this run ended while rank 0 on node1 waited for it in iteration"
        in error
    )
    assert said.splitlines()[-1].startswith(
        "process 1 of 2, on second, ended first, with code 137 (SIGKILL: out of memory,"
    )
    with capsys.disabled():
        print(
            f"\nSIGKILL of a rank on another host: exit 137, the command ended {seconds:.1f} s "
            f"after it; said: {error[:160]}"
        )

    done = train("hosts")
    out, said = done.communicate(timeout=200)
    assert done.returncode == 0 and "resumed from" in said, said
    assert out == f"{tmp_path}/hosts/align/checkpoints/iter_{STEPS:07d}\n"
    assert losses.read_text() == (tmp_path / "alone" / "align" / "losses.jsonl").read_text()


def test_what_would_start_is_told_and_what_cannot_is_refused(train, ssh):
    shown = train(
        "run", "--launcher", "hostfile", "--hostfile", str(ssh / "hosts"), "--dry-run", "--json"
    )
    out, said = shown.communicate(timeout=200)
    assert shown.returncode == 0, said
    launch = json.loads(out)["launch"]
    assert (
        f"--hostfile {ssh}/hosts --launcher pdsh" in launch["command"]
        and "--master_addr 127.0.0.1 --master_port " in launch["command"]
    )
    assert launch["hosts"] == [{"host": "first", "ranks": [0]}, {"host": "second", "ranks": [1]}]
    assert (
        launch["environment"]["HYPENET_NOTE"] == 'a "b" $c 100%'
        and "HF_TOKEN" not in launch["environment"]
    )

    (ssh / "more").write_text("first slots=1\nclosed slots=1\n")
    refused = train("run", "--launcher", "hostfile", "--hostfile", str(ssh / "more"))
    _, said = refused.communicate(timeout=200)
    assert (
        refused.returncode == 4
        and "error: 1 of 2 hosts cannot be used:\n  closed: ssh: " in said
        and "Connection refused" in said
    ), said
