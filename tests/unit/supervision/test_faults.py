"""The fault that came first is translated from its echoes, and each process leaves a record of its
own."""

import json
import time

import pytest

from megatron_hypenet.config.schema import GuardConfig, ParallelConfig
from megatron_hypenet.errors import (
    CheckpointError,
    DataError,
    HangError,
    PeerError,
    SavedAndRequeue,
)
from megatron_hypenet.parallel import groups
from megatron_hypenet.process_place import host_name
from megatron_hypenet.supervision import fault_record, faults
from megatron_hypenet.supervision.faults import (
    Place,
    explained,
    lost_peer,
    record_now,
    timed_out,
    watched,
)
from megatron_hypenet.supervision.heartbeat import PROGRESS, ProgressState, Writer, file_of

CLOSED = RuntimeError(
    "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by "
    "peer [127.0.0.1]:20353. This is "
    "typically caused by a remote worker crashing."
)
WAITED = RuntimeError(
    "[/x/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation to "
    "complete"
)
ABORTED = RuntimeError(
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=4, OpType=ALLREDUCE, "
    "...) ran for 3000 ms"
)
GUARD = GuardConfig(hang_timeout_seconds=60.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    groups.init_parallel(ParallelConfig())
    monkeypatch.setattr(faults, "_SECONDS_FOR_THE_CAUSE", 0.3)


def record(root, rank=0):
    return json.loads((root / "errors" / f"rank_{rank:05d}.json").read_text())


def test_what_libraries_say_of_other_processes():
    assert lost_peer(CLOSED) and not timed_out(CLOSED)
    assert timed_out(WAITED) and timed_out(ABORTED) and not lost_peer(WAITED)
    assert lost_peer(
        RuntimeError(
            "NCCL error: remote process exited or there was a network error, ncclRemoteError"
        )
    )
    for own in (
        RuntimeError("mat1 and mat2 shapes"),
        CheckpointError("Connection closed by peer"),
        BrokenPipeError(32, "Broken pipe"),
    ):
        assert not lost_peer(own) and not timed_out(own)


def test_a_fault_is_recorded_with_place_and_traceback(tmp_path):
    before = time.time()
    with pytest.raises(DataError), watched(tmp_path, GUARD):
        PROGRESS.begin("align", train_iters=9)
        PROGRESS.finish_step(3)
        PROGRESS.note("data")
        raise DataError("shard 7 is empty")
    content = record(tmp_path)
    assert before <= content["time"] <= time.time() and content["host"] == host_name()
    assert (content["rank"], content["stage"], content["phase"], content["iteration"]) == (
        0,
        "align",
        "data",
        3,
    )
    assert (content["type"], content["error"], content["code"], content["echo"]) == (
        "DataError",
        "shard 7 is empty",
        5,
        False,
    )
    assert 'raise DataError("shard 7 is empty")' in content["traceback"] and set(content) <= set(
        fault_record.__doc__.replace(",", " ").split()
    )
    assert json.loads((tmp_path / "heartbeat" / "rank_00000.json").read_text())["state"] == "failed"


def test_beside_the_logs_of_a_job_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPENET_ATTEMPT_LOGS", str(tmp_path / "logs"))
    with pytest.raises(ValueError, match="x"), watched(tmp_path, GUARD):
        raise ValueError("x")
    assert (
        json.loads((tmp_path / "logs" / "rank-0000.error.json").read_text())["error"]
        == "ValueError: x"
    )


def test_a_clean_end_and_a_stop_leave_no_record(tmp_path):
    with watched(tmp_path, GUARD):
        pass
    assert json.loads((tmp_path / "heartbeat" / "rank_00000.json").read_text())["state"] == "done"
    with pytest.raises(SavedAndRequeue), watched(tmp_path, GUARD):
        raise SavedAndRequeue("saved")
    assert (
        json.loads((tmp_path / "heartbeat" / "rank_00000.json").read_text())["state"] == "stopped"
    )
    assert not (tmp_path / "errors").exists()


def test_the_first_record_stays(tmp_path):
    with pytest.raises(CheckpointError), watched(tmp_path, GUARD):
        try:
            raise ValueError("the cause")
        except ValueError as fault:
            record_now(fault)
            raise CheckpointError("what followed") from fault
    assert record(tmp_path)["error"] == "ValueError: the cause"
    record_now(ValueError("outside"))  # nothing is watched any more: without effect
    with pytest.raises(ValueError, match="next"), watched(tmp_path, GUARD):
        raise ValueError("next")
    assert record(tmp_path)["error"] == "ValueError: next"  # of another start


def beating(root, rank, *, state="running", pid=None):
    """Write a file of another rank of the same start."""
    (root / "heartbeat").mkdir(exist_ok=True)
    progress = ProgressState()
    progress.begin("align", train_iters=9)
    writer = Writer(
        root / "heartbeat", attempt_id="now", rank=rank, world_size=3, interval=1, progress=progress
    )
    writer.state = state
    writer.write()
    if pid is not None:
        path = file_of(root / "heartbeat", rank)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": pid}))


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, "now", 0, 3)


def test_an_echo_names_the_cause(tmp_path, place):
    Place(tmp_path, "now", 2, 3).record(PeerError("an echo"))
    Place(tmp_path, "before", 1, 3).record(ValueError("of an earlier start"))
    translated = explained(CLOSED, place)
    assert isinstance(translated, PeerError) and "none has written down why" in str(translated)
    Place(tmp_path, "now", 1, 3).record(ValueError("no such sample"))
    translated = explained(CLOSED, place)
    assert isinstance(translated, PeerError) and translated.exit_code == 1
    assert str(translated).startswith(
        f"rank 1 on {host_name()} failed in "
    ) and "ValueError: no such sample" in str(translated)
    assert "errors/rank_00001.json" in str(translated) and str(translated).endswith(
        "(Connection closed by peer [127.0.0.1]:20353)"
    )


def test_an_echo_of_a_killed_process_says_so(tmp_path, place):
    beating(tmp_path, 1)
    beating(tmp_path, 2, pid=2**22 + 1)  # a number that no process has
    translated = explained(CLOSED, place)
    assert isinstance(
        translated, PeerError
    ) and f"rank 2 on {host_name()} (pid {2**22 + 1}) was killed" in str(translated)


def test_an_echo_of_a_process_that_left_on_request_is_a_stop_too(tmp_path, place):
    beating(tmp_path, 1, state="stopped")
    translated = explained(CLOSED, place)
    assert isinstance(translated, SavedAndRequeue) and "rank 1 on" in str(translated)


def test_a_collective_that_times_out_is_a_hang(tmp_path, place):
    for rank in range(3):
        beating(tmp_path, rank)
    translated = explained(WAITED, place)
    assert isinstance(translated, HangError) and translated.exit_code == 8
    assert (
        "Timed out waiting 3000ms" in str(translated)
        and "rank 1 on" in str(translated)
        and "does not answer" in str(translated)
    )


def test_a_process_alone_has_no_partner_to_lose(tmp_path):
    assert explained(CLOSED, Place(tmp_path, "now", 0, 1)) is CLOSED
