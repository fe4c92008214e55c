import json

import pytest

from megatron_hypenet.cluster.first_error import Fault, faults_of, grouped, numbers_of, ranges

ECHO = "RuntimeError: [gloo] Connection closed by peer [127.0.0.1]:4711"


def fault(rank, error="ValueError: bad", *, host=None, time=1.0, traceback=""):
    return Fault(
        rank=rank, host=host or f"n{rank // 8 + 1}", time=time, error=error, traceback=traceback
    )


def test_equal_faults_of_many_ranks_are_one_group():
    groups = grouped(
        fault(rank, traceback=f'File "x.py", line 3\nValueError: rank {rank} at 0x7f{rank:02x}\n')
        for rank in range(31)
    )
    assert len(groups) == 1
    assert groups[0].who() == "31 ranks on 4 nodes (n1: 0-7, n2: 8-15, n3: 16-23, n4: 24-30)"


def test_the_cause_comes_before_its_echoes_whatever_the_clocks_say():
    echoes = [fault(rank, ECHO, time=1.0) for rank in (0, 1, 2)]
    groups = grouped([*echoes, fault(3, "CheckpointError: gone", time=1.5)])
    assert [group.first.error for group in groups] == ["CheckpointError: gone", ECHO]
    assert [group.first.is_echo for group in groups] == [False, True]


def test_among_causes_the_earliest_is_first():
    groups = grouped([fault(0, "B", time=2.0), fault(1, "A", time=3.0), fault(2, "C", time=1.0)])
    assert [group.first.error for group in groups] == ["C", "B", "A"]


def test_long_lists_of_nodes_are_cut():
    assert (
        grouped(fault(rank, host=f"n{rank}") for rank in range(20))[0]
        .who()
        .endswith("n7: 7, and 12 more)")
    )


def job_log(folder, *lines):
    path = folder / "job-1.log"
    path.write_text(
        "\n".join(["2026-11-23T12:00:00 attempt 0: started on n[1-2], head n1", *lines, ""])
    )
    return path


def attempt(folder, number=0):
    path = folder / f"attempt-{number}"
    path.mkdir()
    return path


def test_a_killed_task_is_the_cause_and_those_that_srun_ended_are_not(tmp_path):
    log = job_log(
        tmp_path,
        "srun: error: n2: tasks 4-5: Killed",
        "srun: launch/slurm: _step_signal: Terminating StepId=1.0",
        "srun: error: n1: task 0: Killed",
        "2026-11-23T12:00:09 attempt 0: ended with code 137",
    )
    folder = attempt(tmp_path)
    record = {"rank": 1, "host": "n1", "time": 5.0, "code": 1, "error": ECHO, "traceback": ECHO}
    (folder / "rank-0001.error.json").write_text(json.dumps(record))
    groups = grouped(faults_of(folder, log))
    assert [(group.who(), group.first.error) for group in groups] == [
        ("2 ranks on 1 node (n2: 4-5)", "task ended by a signal: Killed"),
        ("rank 1 on n1", ECHO),
    ]


def test_a_node_that_slurm_lost_is_the_cause(tmp_path):
    log = job_log(
        tmp_path,
        "srun: error: n1: task 0: Exited with exit code 1",
        "srun: error: Node failure on n2",
        "slurmstepd-n1: error: *** JOB 1 ON n1 CANCELLED AT 2026-11-23T12:00:09 DUE TO NODE "
        "FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***",
        "srun: error: n1: task 1: Killed",
    )
    folder = attempt(tmp_path)
    for rank, host in enumerate(("n1", "n1", "n2", "n2")):
        (folder / f"rank-{rank:04d}.log").write_text(
            f"node {host} attempt 0 RANK={rank} WORLD_SIZE=4\n"
        )
    record = {
        "rank": 0,
        "host": "n1",
        "time": 5.0,
        "code": 1,
        "error": "another process of this run ended",
        "traceback": "",
        "echo": True,
    }
    (folder / "rank-0000.error.json").write_text(json.dumps(record))
    groups = grouped(faults_of(folder, log))
    assert [(group.who(), group.first.error) for group in groups] == [
        ("2 ranks on 1 node (n2: 2-3)", "its node failed: SLURM reached it no more"),
        ("rank 0 on n1", "another process of this run ended"),
    ]
    assert groups[1].first.is_echo


def test_only_this_start_of_the_job_counts(tmp_path):
    log = job_log(
        tmp_path,
        "srun: error: n2: task 1: Killed",
        "2026-11-23T12:00:09 attempt 0: ended with code 137",
        "2026-11-23T12:00:19 attempt 1: started on n[1-2], head n1",
        "srun: error: n1: task 0: Segmentation fault",
        "2026-11-23T12:00:29 attempt 1: ended with code 139",
    )
    assert [(one.rank, one.host) for one in faults_of(attempt(tmp_path, 0), log)] == [(1, "n2")]
    assert [(one.rank, one.host) for one in faults_of(attempt(tmp_path, 1), log)] == [(0, "n1")]


def test_a_rank_without_a_record_is_read_from_its_log(tmp_path):
    folder = attempt(tmp_path)
    (folder / "rank-0002.log").write_text(
        "node n7 attempt 0 RANK=2 WORLD_SIZE=4\nTraceback (most recent call last):\n  File "
        "\"a.py\", line 1\nKeyError: 'x'\nand more\n"
    )
    (folder / "rank-0003.log").write_text(
        "node n8 attempt 0 RANK=3 WORLD_SIZE=4\nFatal Python error: Segmentation fault\n\nThread "
        "0x1\n"
    )
    (folder / "rank-0001.log").write_text("all is well\n")
    found = {one.rank: one for one in faults_of(folder, job_log(tmp_path))}
    assert {rank: (one.host, one.error) for rank, one in found.items()} == {
        2: ("n7", "KeyError: 'x'"),
        3: ("n8", "Fatal Python error: Segmentation fault"),
    }
    assert "a.py" in found[2].traceback and "and more" not in found[2].traceback


def test_a_torn_record_counts_for_nothing(tmp_path):
    folder = attempt(tmp_path)
    (folder / "rank-0000.error.json").write_text('{"rank": 0, "ho')
    assert faults_of(folder, job_log(tmp_path)) == []


@pytest.mark.parametrize(
    ("text", "numbers"), [("3", [3]), ("0-2,7", [0, 1, 2, 7]), ("0-1,4-5", [0, 1, 4, 5])]
)
def test_slurms_short_form_of_numbers(text, numbers):
    assert numbers_of(text) == numbers and ranges(numbers) == text


FATAL = (
    "srun: fatal: SLURM_MEM_PER_CPU, SLURM_MEM_PER_GPU, and SLURM_MEM_PER_NODE are mutually "
    "exclusive."
)


def test_why_srun_could_start_nothing(tmp_path):
    log = job_log(tmp_path, "srun: error: something before it", FATAL)
    (found,) = grouped(faults_of(attempt(tmp_path), log))
    assert found.first.error == FATAL and found.who() == "SLURM"
    assert found.as_json()["ranks"] == [] and "something before it" in found.as_json()["traceback"]


def test_srun_is_quoted_only_where_no_rank_is(tmp_path):
    folder = attempt(tmp_path)
    (folder / "rank-0000.log").write_text("Traceback (most recent call last):\nKeyError: 'x'\n")
    (found,) = faults_of(folder, job_log(tmp_path, FATAL))
    assert (found.rank, found.error) == (0, "KeyError: 'x'")


def test_a_task_that_slurmstepd_could_not_start(tmp_path):
    folder = attempt(tmp_path)
    line = "slurmstepd-n1: error: execve(): no-such-python: No such file or directory"
    (folder / "rank-0001.log").write_text(f"{line}\n")
    (found,) = faults_of(
        folder, job_log(tmp_path, "srun: error: n1: task 1: Exited with exit code 2")
    )
    assert (found.rank, found.error) == (1, line)


@pytest.mark.parametrize(
    "line",
    [
        "slurmstepd-n1: error: *** JOB 1 ON n1 CANCELLED AT 2026-11-23T12:00:09 DUE TO TIME LIMIT "
        "***",
        "slurmstepd-n1: error: *** STEP 1.0 ON n1 CANCELLED AT 2026-11-23T12:00:09 DUE TO "
        "PREEMPTION ***",
        "srun: error: n1: task 0: Exited with exit code 75",
        "srun: Job step aborted: Waiting up to 32 seconds for job step to finish.",
    ],
)
def test_the_ordinary_end_of_a_start_is_no_error(tmp_path, line):
    folder = attempt(tmp_path)
    (folder / "rank-0000.log").write_text(f"{line}\n")
    assert faults_of(folder, job_log(tmp_path, line)) == []
