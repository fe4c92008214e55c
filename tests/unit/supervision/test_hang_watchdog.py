"""A silent main thread is noticed after its time, not before; the report names who holds the others
up."""

import json
import time

import pytest

from megatron_hypenet.config.schema import GuardConfig
from megatron_hypenet.supervision import hang_watchdog
from megatron_hypenet.supervision.hang_watchdog import HangWatch, collective_minutes, suspects
from megatron_hypenet.supervision.heartbeat import Beat, ProgressState, Writer, file_of


@pytest.fixture
def world(tmp_path):
    """Provide a watch with a timeout of 0.4 s over a process that trains, and what it did."""
    progress = ProgressState()
    seen = []
    progress.begin("align", train_iters=5)
    progress.finish_step(2)
    (tmp_path / "heartbeat").mkdir()
    writer = Writer(
        tmp_path / "heartbeat",
        attempt_id="now",
        rank=1,
        world_size=2,
        interval=0.1,
        progress=progress,
    )
    writer.start()
    watch = HangWatch(
        writer,
        0.4,
        tmp_path / "errors",
        record=lambda error: seen.append(error),
        end=lambda code: seen.append(code),
    )
    yield watch, progress, seen
    watch.stop()
    writer.stop("done")


def eventually(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_silent_process_is_reported_with_stacks_and_ended_with_8(world, tmp_path, capfd):
    watch, progress, seen = world
    watch.start()
    progress.note("reduce")
    eventually(lambda: 8 in seen)
    error, code = seen
    said = capfd.readouterr().err
    assert code == 8 and str(error) in said and "guard.hang_timeout_seconds=0.4" in said
    assert (
        "rank 1 on " in said
        and "hangs in iteration 3/5 of align, reduce" in said
        and "no sign of rank 0" in said
    )
    text = (tmp_path / "errors" / "hang_rank_00001.txt").read_text()
    assert "no sign of rank 0" in text and "Thread 0x" in text and "test_hang_watchdog.py" in text
    assert json.loads(file_of(tmp_path / "heartbeat", 1).read_text())["state"] == "hung"


def test_a_process_that_gets_on_is_left_alone(world):
    watch, progress, seen = world
    watch.start()
    for _ in range(20):
        time.sleep(0.05)
        progress.note("data")
    assert seen == []


def test_phases_have_their_own_limits(world):
    watch, progress, _ = world
    progress.note("forward-backward")
    assert watch.limit() == 0.4
    progress.note("save")
    assert watch.limit() == 0.8
    progress.note("alone")
    assert watch.limit() == float("inf")
    progress.begin("distill", train_iters=5)
    progress.note("forward-backward")
    assert watch.limit() == 0.8  # its first step compiles


def test_a_process_that_was_stopped_as_a_whole_does_not_hang(world):
    watch, progress, _ = world
    progress.note("data")
    time.sleep(0.6)
    assert "no progress for 1 s" in watch.what_hangs()
    # what the thread notes when it finds that it has slept too long
    watch._awake = time.monotonic()
    assert watch.what_hangs() is None


def test_waiting_for_the_first_process_ends_when_that_one_is_gone(world, tmp_path):
    watch, progress, _ = world
    first = Writer(
        tmp_path / "heartbeat",
        attempt_id="now",
        rank=0,
        world_size=2,
        interval=1,
        progress=ProgressState(),
    )
    progress.note("waiting")
    for _ in range(8):
        first.write()
        assert watch.what_hangs() is None
        time.sleep(0.1)
    eventually(
        lambda: (time.sleep(0.05), "rank 0, for which it waits" in str(watch.what_hangs()))[1]
    )


def test_a_process_that_cannot_end_after_its_fault_is_ended_with_its_code(world):
    watch, progress, seen = world
    watch.expect_end(5, 0.2)
    watch.start()
    eventually(lambda: seen)
    assert seen[0] == 5


def beat(rank, *, phase="reduce", iteration=4, state="running", host="n0", silent=9.0):
    return Beat(
        rank=rank,
        host=host,
        pid=100 + rank,
        state=state,
        beats=7,
        begun=2,
        stage="distill",
        phase=phase,
        iteration=iteration,
        train_iters=9,
        silent_seconds=silent,
    )


def test_suspects():
    everyone = {rank: beat(rank) for rank in range(4)}
    assert suspects(everyone, (), 4) == [
        "no rank is behind the others: they wait for each other, or all for the same thing; "
        "compare their stacks"
    ]
    assert suspects(everyone, {2}, 4) == [
        "rank 2 on n0 (pid 102) does not answer: its process is stopped or dead, "
        "or its node is (last heartbeat: "
        "iteration 5/9 of distill, reduce)"
    ]
    assert suspects(everyone | {3: beat(3, phase="data", host="n1")}, (), 5) == [
        "no sign of rank 4 in this start of the run",
        "rank 3 on n1 (pid 103) is behind the others: in iteration 5/9 of distill, data, "
        "without progress for 9 s",
    ]
    assert suspects(everyone | {1: beat(1, state="failed", phase="update")}, (), 4) == [
        "rank 1 on n0 (pid 101) has failed in iteration 5/9 of distill, update; "
        "see rank_00001.json beside this"
    ]
    many = {rank: beat(rank, iteration=3 if rank < 20 else 4) for rank in range(30)}
    assert (
        len(suspects(many, (), 30)) == hang_watchdog._LONGEST_LIST + 1
        and suspects(many, (), 30)[-1] == "and 12 more ranks like these"
    )


def test_libraries_wait_longer_than_we_do():
    for seconds in (10.0, 1800.0, 1e6):
        assert collective_minutes(GuardConfig(hang_timeout_seconds=seconds)) * 60 > 2 * seconds
