"""What a submitted script decides when its processes have ended: the real script, with programs in
the place of srun and scontrol."""

import contextlib
import json
import os
import socket
import subprocess

import pytest

from megatron_hypenet.cluster.job_script import job_scripts
from megatron_hypenet.config.cluster import ClusterConfig
from tests.unit.cli.slurm_answers import Answers

SCONTROL = """case "$*" in
  *hostnames*) echo n1;;
  *"show node"*) echo "NodeName=n1 NodeAddr=10.0.0.1";;
  *"show job"*) echo "JobId=7 JobState=${STATE:-RUNNING} Reason=None";;
esac"""


class Job:
    """A job of a run, started again and again."""

    def __init__(self, folder, monkeypatch, on_event=(), **requeue):
        self.run = folder / "a run"
        self.answers = Answers(folder, monkeypatch)
        self.answers["scontrol"] = SCONTROL
        (self.run / "logs").mkdir(parents=True)
        cluster = ClusterConfig(
            nodes=1, gpus_per_node=0, tasks_per_node=1, time="10", requeue=requeue
        )
        self.script = job_scripts(self.run, cluster, chain=False, on_event=on_event)[0].text

    def start(self, srun, attempt=0, **environment):
        """Exit code of the script when srun does `srun`."""
        self.answers["srun"] = srun
        own = {
            "SLURM_JOB_ID": "7",
            "SLURM_RESTART_COUNT": str(attempt),
            "SLURM_JOB_NODELIST": "n1",
            **environment,
        }
        with (self.run / "logs" / "job-7.log").open("a") as log:
            words = {
                "input": self.script,
                "text": True,
                "env": {**os.environ, **own},
                "stdout": log,
                "stderr": log,
            }
            return subprocess.run(["bash"], check=False, **words).returncode

    def events(self):
        return [
            line.split(" ", 2)[2]
            for line in (self.run / "logs" / "job-7" / "events").read_text().splitlines()
        ]

    def requeued(self):
        return len(self.answers.calls("scontrol requeue 7"))


@pytest.fixture
def job(tmp_path, monkeypatch):
    return Job(tmp_path, monkeypatch, limit=3, without_progress=2)


def record(rank, code, **more):
    """Return shell code that leaves the record of a task's end, as launchers/slurm.py does."""
    text = json.dumps({"rank": rank, "code": code, **more}, indent=2)
    return f"cat >\"$HYPENET_ATTEMPT_LOGS/rank-{rank:04d}.error.json\" <<'END'\n{text}\nEND\n"


@pytest.mark.parametrize(
    ("srun", "code", "again"),
    [
        ("exit 0", 0, False),
        ("exit 75", 75, True),
        ("exit 137", 137, True),
        ("exit 5", 5, False),
        (record(1, 7) + "exit 75", 7, False),  # the others leave with 75, which is higher
        (record(0, 1, echo=True) + "sleep 0.01\n" + record(1, 5) + "exit 75", 5, False),
        (record(0, 1, echo=True) + "exit 1", 137, True),  # its partner has left no word
        (record(0, 1, echo=True) + "exit 139", 139, True),
    ],
)
def test_the_first_fault_decides(job, srun, code, again):
    assert job.start(srun) == code
    assert f"ended with code {code}" in job.events() and job.requeued() == again == (
        "starting again" in job.events()
    )


def test_it_stays_down_when_it_is_cancelled_or_told_to_stop(job):
    assert (
        job.start("exit 75", STATE="CANCELLED") == 75
        and job.events()[-1] == "not started again: CANCELLED"
    )
    assert job.start(f"touch '{job.run / 'STOP'}'; exit 75") == 75 and job.requeued() == 0
    assert job.events()[-1].startswith("not started again: ") and job.events()[-1].endswith(
        "STOP is there"
    )


def test_it_does_not_start_where_a_stop_file_came_after_it_was_submitted(job):
    (job.run / "STOP").touch()
    assert job.start("exit 0") == 75 and job.requeued() == 0
    assert job.events() == [f"not started: {job.run / 'STOP'} is there"]
    (job.run / "STOP").unlink()
    assert job.start("exit $((HYPENET_UNDER_WAY == 1 ? 0 : 9))") == 0


def test_a_job_that_is_still_being_warned_of_its_limit_starts_again(job):
    assert job.start("exit 75", STATE="SIGNALING") == 75 and job.requeued() == 1


def test_a_job_that_overran_its_limit_while_it_saved_starts_again(job):
    """SLURM ends the script with SIGTERM, and its reason is the time limit."""
    overran = SCONTROL.replace("Reason=None", "Reason=TimeLimit")
    job.answers["scontrol"] = overran
    assert job.start("kill -TERM $PPID; sleep 0.2; exit 0", STATE="COMPLETING") == 137
    assert job.requeued() == 1 and job.events()[-1] == "starting again"
    assert "the time limit came before everything was saved (grace_seconds)" in job.events()
    # cancelled: another reason, and no word
    job.answers["scontrol"] = SCONTROL
    assert job.start("kill -TERM $PPID; sleep 0.2; exit 0", STATE="COMPLETING") == -15
    assert job.requeued() == 1


def test_slurm_may_refuse(job):
    job.answers["sleep"] = "true"
    job.answers["scontrol"] = SCONTROL + '\n[ "$1" != requeue ]'
    job.start("exit 75")
    assert job.requeued() == 3 and job.events()[-1].startswith(
        "SLURM refuses to start it again; use: hypenet requeue "
    )


def test_starts_without_progress_are_counted(job):
    save = (
        'folder="{run}/align/checkpoints/iter_$SLURM_RESTART_COUNT"; mkdir -p "$folder"; '
        'touch "$folder/COMMITTED"; exit 75'
    )
    job.start("exit 137")
    job.start(save.format(run=job.run), attempt=1)
    assert job.requeued() == 2
    job.start("exit 137", attempt=2)
    assert job.requeued() == 3
    job.start("exit 137", attempt=3)  # the limit
    assert job.requeued() == 3 and job.events()[-1].startswith("gave up: started again 3 times")


def test_two_starts_in_a_row_without_progress_are_enough(job):
    job.start("exit 137")
    job.start("exit 137", attempt=1)
    assert job.requeued() == 1 and job.events()[-1].startswith(
        "gave up: 2 starts in a row without a new checkpoint"
    )
    # SLURM itself started it again
    assert job.start("exit 0", attempt=2) == 75 and "started on" not in job.events()[-1]


def test_a_start_whose_first_node_died_is_told_of(job):
    assert job.start("kill -9 $PPID") == -9
    job.start("exit 0", attempt=1)
    assert job.events()[1].startswith("starts again after a start that ended without a word")


def test_a_start_that_slurm_ended_says_why(job):
    ended = (
        "echo 'slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-23T14:28:33 DUE TO NODE "
        "FAILURE, SEE LOG ***'; kill -9 $PPID"
    )
    assert job.start(ended) == -9
    job.start("exit 75", attempt=1)
    assert job.events()[1] == "starts again due to node failure" and job.events()[2].startswith(
        "started on n1"
    )
    job.start("exit 0", attempt=2)
    # not where the script itself asked for it
    assert sum(event.startswith("starts again") for event in job.events()) == 1


def test_commands_of_on_event_hear_of_a_new_start(tmp_path, monkeypatch):
    heard = tmp_path / "it's heard"
    note = f'echo "$HYPENET_EVENT|$HYPENET_RUN|$HYPENET_MESSAGE" >> "{heard}"'
    job = Job(tmp_path, monkeypatch, on_event=["exit 3", note], limit=3, without_progress=2)
    assert job.start("exit 75") == 75 and job.requeued() == 1
    assert job.start("exit 5") == 5  # the run itself has told of that
    assert heard.read_text() == f"requeued|{job.run}|job 7 starts again after code 75\n"
    assert "on_event: exit 3 ended with code 3" in (job.run / "logs" / "job-7.log").read_text()


def held(address, port):
    return socket.create_server(
        (address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET
    )


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_port_follows_from_the_number_of_the_job_unless_something_listens_there(
    tmp_path, monkeypatch, address
):
    job = Job(tmp_path, monkeypatch, limit=9, without_progress=9)
    ports = tmp_path / "ports"
    for number in range(os.getpid() % 10_000, 20_000, 7):
        with contextlib.suppress(OSError), held(address, 10_000 + number):
            own = {"SLURM_JOB_ID": str(number), "PORTS": str(ports)}
            for more in ({}, {"HYPENET_MASTER_PORT": "4711"}):
                job.start('echo "$HYPENET_MASTER_PORT" >>"$PORTS"', **own, **more)
            break
    job.start('echo "$HYPENET_MASTER_PORT" >>"$PORTS"', **own)
    moved, chosen, first = map(int, ports.read_text().split())
    assert (moved - first) % 20_000 % 997 == 0 and moved != first and chosen == 4711
    assert first == 10_000 + number
    assert (
        f"something listens at port {first} of n1 already"
        in (job.run / "logs" / "job-7.log").read_text()
    )
